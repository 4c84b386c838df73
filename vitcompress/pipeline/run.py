"""What is there to do, once a recipe has been checked?  Its plan, start, training, and what is written of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import TypeAdapter
from torch import Tensor, nn

from vitcompress.artifact import file as artifact
from vitcompress.artifact.digest import sha256_of
from vitcompress.data import ImageSet, open_sets
from vitcompress.data.calibration import calibration_batches, drawn
from vitcompress.data.classes import known_classes
from vitcompress.data.views import Views
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.distill.facts import run_facts
from vitcompress.distill.fading import fading
from vitcompress.distill.log import MOST_POINTS, TrainLog
from vitcompress.distill.matching import Matching
from vitcompress.distill.schedule import lr_for_start
from vitcompress.distill.teacher import Teacher
from vitcompress.errors import Faults, RecipeError
from vitcompress.families.find import family_named
from vitcompress.families.outputs import has_classes
from vitcompress.initialize import aligned, needs_images, start_student
from vitcompress.measure.accuracy import Evaluator
from vitcompress.measure.baselines import BASELINES, measure_baselines
from vitcompress.measure.latency import measure_speed
from vitcompress.measure.macs import with_macs
from vitcompress.measure.results import MOST_CLASSES, MOST_CONFUSIONS, Accuracy, Baseline, ClassHits, Confusion, Speed
from vitcompress.pipeline.budget import training_seconds
from vitcompress.pipeline.checks import (
    bundle_of,
    check_checkpoint,
    check_measurable,
    check_out,
    check_run,
    check_states,
    files_read,
    unfit_images,
    with_images,
)
from vitcompress.pipeline.deliver import Stored, described, report_of, write_result
from vitcompress.pipeline.planning import Planning
from vitcompress.pipeline.produce import Lesson, load_adapted, measure, num_steps, train
from vitcompress.pipeline.settle import compared, settle, with_losses
from vitcompress.plans.model import Plan
from vitcompress.pretrained.source import Source, empty_model
from vitcompress.quantize.layers import quantising
from vitcompress.recipe import KINDS, Recipe
from vitcompress.recipe.compose import to_dict
from vitcompress.report.gates import unreachable_gates
from vitcompress.report.model import Report, to_json
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.processes import alone, from_main, join
from vitcompress.search.sensitivity import divergence_and_chance
from vitcompress.surgery import apply_plan

JUDGED_IMAGES = 128  # of the calibration images, to tell how far a start is

# what a header is counted with before there are numbers
_LONG_COUNT, _LONG_NUMBER, _LONG_ROUNDED = 10**12, 1.2345678901234567e-05, -12345.678912
_LONG_LINE, _MOST_LINES = 120 * "-", len(KINDS) + 2
_SPARE_BYTES = 1024  # for notes on what a plan leaves of the losses


@dataclass(frozen=True)
class Job:
    """A recipe that has been checked, with what it names found."""

    recipe: Recipe
    out: Path
    command: str
    source: Source
    plan: Plan
    config: dict[str, Any]
    train: ImageSet | None
    val: ImageSet | None
    teacher: Teacher | None
    comparison: Matching
    accelerator: Accelerator

    def planning(self, teacher: nn.Module, reporter: Reporter) -> Planning:
        """What a plan for the target is searched for with."""
        assert self.train is not None  # prepare_job saw to it
        empty = empty_model(self.source)
        bound = partial(self._header_bytes, empty)
        return Planning(teacher, self.source.name, self.recipe, self.train, self.config, reporter, bound)

    def _header_bytes(self, empty: nn.Module, plan: Plan, store: str) -> int:
        """The most that the header of a plan's file takes: with every number as long as numbers get."""
        student = copy.deepcopy(empty)
        apply_plan(student, plan)
        job = replace(self, plan=replace(plan, why=(_LONG_LINE,) * _MOST_LINES))
        size = replace(job.plan.size, teacher_macs=_LONG_COUNT, student_macs=_LONG_COUNT, macs_ratio=_LONG_NUMBER)
        stored = Stored({}, replace(job.plan, size=size), store)
        losses = dict.fromkeys((*self.comparison.losses, *(self.recipe.distill.loss or {})), _LONG_NUMBER)
        point = dict.fromkeys(("step", "lr", "loss", *losses), _LONG_ROUNDED)
        steps = num_steps(self._lesson())
        points = (point,) * (MOST_POINTS if steps is None else min(steps, MOST_POINTS))
        name = (self.teacher or self.source).name
        counts, times = (_LONG_COUNT,) * 3, dict.fromkeys(("1", "32"), _LONG_NUMBER)
        log = TrainLog(*counts, _LONG_NUMBER, _LONG_NUMBER, points, name, losses) if points else TrainLog()
        accuracy: Accuracy | None = None
        baselines: tuple[Baseline, ...] = ()
        if self.val is not None:
            number = _LONG_NUMBER
            accuracy = Accuracy(
                self.val.name, _LONG_COUNT, _LONG_COUNT, number, number, number, number, number, (number, number),
                number, number, number, *_longest_tables(int(empty.num_classes)),  # type: ignore[arg-type]
            )  # fmt: skip
            baselines = tuple(Baseline(f"teacher {each}", *counts[1:], *[number] * 4) for each in BASELINES)
        report = job._report(stored, accuracy, Speed(times, times, _LONG_COUNT, _LONG_LINE), log, baselines)
        distill = replace(self.recipe.distill, lr=_LONG_NUMBER, loss=losses or None)
        recipe = replace(self.recipe, distill=distill, store=replace(self.recipe.store, store=store))  # type: ignore[arg-type]
        manifest = replace(job, recipe=recipe)._manifest("0" * 64, stored, report)
        return artifact.header_bytes(student, manifest) + _SPARE_BYTES

    def planned(self, teacher: nn.Module, reporter: Reporter) -> Job:
        """The same job with the plan that is found for its target; of several processes, by the main one."""
        main = self.accelerator.is_main_process
        found = self.planning(teacher, reporter).find() if main else None
        plan, store = from_main((found.plan, found.store) if found else None, self.accelerator) or (self.plan, "")
        for line in plan.why:
            reporter.say(line)
        return self.with_plan(with_macs(plan, empty_model(self.source), self.config["input_size"]), store)

    def with_plan(self, plan: Plan, store: str) -> Job:
        """The same job with a plan that was searched for, and the store that it counts on."""
        comparison = compared(self.source, empty_model(self.source), plan, self.teacher, self.recipe, self.config)
        recipe = with_losses(self.recipe, comparison.losses)
        recipe = replace(recipe, store=replace(recipe.store, store=store))  # type: ignore[arg-type]
        return replace(self, recipe=recipe, plan=plan, comparison=comparison)

    def begun(
        self, teacher: nn.Module, checkpoints: Checkpoints | None, reporter: Reporter
    ) -> tuple[Job, nn.Module, nn.Module]:  # fmt: skip
        """The job with all settled, and its student before training; or as an interrupted run left them.

        The third is what the student was made of: it computes what the teacher does, heads and neurons elsewhere.

        Args:
            teacher: the source, on the accelerator's device.
            checkpoints: where an interrupted run left its state; None where none is kept.
            reporter: told of it.
        """
        recipe = self.recipe
        other = {"teacher.sha256": self.teacher.sha256()} if self.teacher else {}
        facts = run_facts(
            to_dict(recipe), self.train, **{"model.sha256": sha256_of(teacher.state_dict())}, **other,
            num_processes=self.accelerator.num_processes, torch=torch.__version__,
        )  # fmt: skip
        settled = checkpoints.resumed(facts, resume=recipe.run.resume, say=reporter.say) if checkpoints else None
        job = self
        if settled is not None:
            job = job.with_plan(TypeAdapter(Plan).validate_python(settled["plan"]), settled["store"])
            job = replace(job, recipe=replace(job.recipe, distill=replace(job.recipe.distill, lr=settled["lr"])))
        elif recipe.target.is_given:
            job = job.planned(teacher, reporter)
        size = job.plan.size
        reporter.say(f"{job.source.name}: {size.teacher_params:,} → {size.student_params:,} parameters")
        source = aligned(teacher, job.plan)
        student = copy.deepcopy(source)
        apply_plan(student, job.plan)
        trained = settled is not None and checkpoints is not None and checkpoints.newest() is not None
        if not trained or recipe.distill.fade:  # what fades is the difference from the start
            start_student(student, source, job.plan, lambda: job._calibration(teacher), recipe.start.start)
        if settled is None:
            job = job.tuned(student, teacher, reporter)
            if checkpoints and recipe.distill.steps != 0 and job.accelerator.is_main_process:
                plan = TypeAdapter(Plan).dump_python(job.plan, mode="json")
                lr, store = job.recipe.distill.lr, job.recipe.store.store
                checkpoints.begin(facts, {"plan": plan, "store": store, "lr": lr}, eager=recipe.target.is_given)
        return job, student, source

    def _calibration(self, teacher: nn.Module) -> Iterator[Tensor]:
        assert self.train is not None  # prepare_job saw to it
        chosen = drawn(self.train, self.recipe.start.calibration_images, seed=self.recipe.run.seed)
        device = next(teacher.parameters()).device
        return (batch.to(device) for batch in calibration_batches(chosen, self.config, self.recipe.data))

    def tuned(self, student: nn.Module, source: nn.Module, reporter: Reporter) -> Job:
        """The same job with a learning rate that fits its start, where none was given."""
        recipe = self.recipe.distill
        if recipe.lr is not None or recipe.steps == 0 or not has_classes(source):
            return self
        batches: list[Tensor] = []
        for batch in self._calibration(source):
            batches.append(batch)
            if sum(map(len, batches)) >= JUDGED_IMAGES:
                break  # all would be decoded a second time
        images = torch.cat(batches)[:JUDGED_IMAGES]
        far, chance = divergence_and_chance(student.eval(), source, images)
        width = int(source.num_features)  # type: ignore[arg-type]
        lr = from_main(lr_for_start(far, chance, self.recipe.data.batch_size, width), self.accelerator)
        reporter.say(f"start: {far:.3f} nats from {self.source.name} ({chance:.2f} would be chance): --lr {lr:.2g}")
        return replace(self, recipe=replace(self.recipe, distill=replace(recipe, lr=lr)))

    def distill(
        self, student: nn.Module, source: nn.Module, original: nn.Module, checkpoints: Checkpoints | None,
        started: float, reporter: Reporter,
    ) -> TrainLog:  # fmt: skip
        """Train the student, in place, to do what the teacher does: the source, if no other is named.

        Args:
            student: before training.
            source: what it was made of.
            original: as it was loaded, which computes the same.
            checkpoints: where the state of the training is kept; None where it is not.
            started: when the command was, in seconds since 1970.
            reporter: shows how it goes.
        """
        student.to(self.accelerator.device)  # before the source's matrices are laid beside it
        teacher = load_adapted(self.teacher, self.config, self.comparison) if self.teacher else source
        how = self.recipe.store
        if self.recipe.distill.fade and num_steps(self._lesson()) != 0:
            reporter.say(
                f"the blocks' own matrices fade out until {self.recipe.distill.fade:.0%} of the training: "
                "the loss rises from near 0 until then, and falls after"
            )
        with (
            fading(student, source, self.plan, self.recipe.distill.fade) as fade,
            quantising(student, how.kind, how.qat_fraction) as quantise,
        ):

            def follow(done: float) -> None:
                fade(done)
                quantise(done)

            return train(
                student, teacher, self._lesson(), blocks=family_named(self.plan.family).block_names(source),
                matrices=self.plan.matrices, fade=follow, accelerator=self.accelerator, reporter=reporter,
                same_as=None if self.teacher else original,
                checkpoints=checkpoints, seconds=training_seconds(
                    self.recipe.distill.max_minutes, started, student, source, self.evaluator,
                    baselines=self.recipe.store.baselines,
                ),
            )  # fmt: skip

    @property
    def evaluator(self) -> Evaluator:
        """What models are evaluated with."""
        return Evaluator(self.val, self.config, self.recipe.data, self.accelerator, self.recipe.distill.accumulate)

    def _lesson(self) -> Lesson:
        name = self.teacher.name if self.teacher else self.source.name
        return Lesson(self.recipe, self.train, self.config, self.comparison, name)

    def finish(self, student: nn.Module, teacher: nn.Module, log: TrainLog, out: Path, reporter: Reporter) -> Report:
        """Round, evaluate, write and verify; returns the report that went into the file. The main process writes."""
        stored = Stored.of(student, self.plan, self.recipe.store.kind)
        stored.round(student)
        accuracy = measure(student, teacher, self.evaluator, reporter)
        baselines = self._baselines(teacher, accuracy, reporter)
        report: Report | None = None
        if self.accelerator.is_main_process:
            speed = measure_speed(student, teacher, self.config["input_size"], device=self.accelerator.device)
            report = self._report(stored, accuracy, speed, log, baselines)
            manifest = self._manifest(sha256_of(teacher.state_dict()), stored, report)
            write_result(out, student, stored, manifest, report, reporter)
        whole = from_main(report, self.accelerator)
        assert whole is not None  # the main process made it
        return whole

    def _report(
        self, stored: Stored, accuracy: Accuracy | None, speed: Speed, log: TrainLog, baselines: tuple[Baseline, ...]
    ) -> Report:
        return report_of(
            stored, self.source, accuracy=accuracy, speed=speed, train=log, baselines=baselines,
            data=self.train.name if self.train and log.steps else None, command=self.command, why=self.plan.why,
            notes=self.image_notes + (self._teacher_notes() if log.steps else ()),
        )  # fmt: skip

    def _manifest(self, source_sha256: str, stored: Stored, report: Report) -> artifact.Manifest:
        """What the file says of itself."""
        return artifact.Manifest(
            source=described(self.source),
            source_sha256=source_sha256,
            plan=stored.plan,
            data_config=self.config,
            recipe=to_dict(self.recipe),
            report=to_json(report),
            versions=report.versions,
            classes=tuple(self.source.pretrained_cfg.get("label_names", ()))
            or (self.train.classes if self.train else ()),
            store=stored.store,
        )

    @property
    def image_notes(self) -> tuple[str, ...]:
        """What the user must know of the training images."""
        return (self.train.note,) if self.train is not None and self.train.note else ()

    def _baselines(self, teacher: nn.Module, accuracy: Accuracy | None, reporter: Reporter) -> tuple[Baseline, ...]:
        if accuracy is None or not self.recipe.store.baselines:
            return ()
        return measure_baselines(teacher, self.evaluator, accuracy, reporter)

    def _teacher_notes(self) -> tuple[str, ...]:
        """What a reader of the report must know where the student learned from another model."""
        if self.teacher is None:
            return self.comparison.notes
        taught = f"The student learned from {self.teacher.name}; it is compared with {self.source.name} all the same."
        return (taught, *self.comparison.notes)


def _longest_tables(num_classes: int) -> tuple[tuple[ClassHits, ...], tuple[Confusion, ...]]:
    """The longest tables of classes and of confusions that an evaluation of a model may come to."""
    classes, confusions = ClassHits(*[_LONG_COUNT] * 4), Confusion(*[_LONG_COUNT] * 4)
    pairs = num_classes * (num_classes - 1)
    return (classes,) * min(num_classes, MOST_CLASSES), (confusions,) * min(pairs, MOST_CONFUSIONS)


def prepare_job(
    recipe: Recipe, out: Path | None, command: str, *, measures: bool = False, joins: bool = True
) -> Job:  # fmt: skip
    """Check a recipe and find what it names, before any weight is loaded.

    Args:
        recipe: what to do.
        out: where to write; None where nothing is written.
        command: what was typed.
        measures: options are measured on images, and nothing is trained.
        joins: it will run here, with the other processes there are.

    Raises:
        VitcompressError: every fault that can be told by looking, at once.
    """
    faults = Faults()
    attempt = faults.attempt
    if out is not None:
        attempt(check_out, out, files_read(recipe))
        attempt(check_states, out, recipe.run)
    attempt(check_run, recipe, trains=not measures, starts=not joins)
    attempt(check_checkpoint, recipe.model)
    settled = settle(recipe, attempt, measures=measures)
    if measures and settled.model is not None:
        attempt(check_measurable, settled.model)
    if settled.plan and not (measures or recipe.target.is_given):
        faults.extend(unreachable_gates(settled.plan.size, recipe.gates))
    source, model, config = settled.source, settled.model, settled.config
    train = val = None
    if model is not None and hasattr(model, "num_classes"):
        searched = measures or recipe.target.is_given
        fitted = searched or bool(settled.plan and needs_images(settled.plan, recipe.start.start))
        recipe = with_images(recipe, fitted=fitted)
        sets = attempt(
            open_sets, recipe.data, bundle=bundle_of(source.name), num_classes=model.num_classes,
            seed=recipe.run.seed, classes=known_classes((), source.pretrained_cfg, model.num_classes),
            flag="--calibrate" if measures else "--data",
        )  # fmt: skip
        train, val = sets or (None, None)
        if sets is not None:
            faults.extend(unfit_images(recipe, train, val))
        if config and train is not None:
            attempt(Views, train, config, training=True, recipe=recipe.data, seed=0)
    faults.raise_as(RecipeError)
    accelerator = join(recipe.run, (out or Path()).parent) if joins else alone()
    assert settled.comparison is not None  # else there was a fault
    return Job(
        recipe if recipe.target.is_given else with_losses(recipe, settled.comparison.losses),
        out or Path(),
        command,
        source,
        settled.plan,
        config,
        train,
        val,
        settled.teacher,
        settled.comparison,
        accelerator,
    )
