"""How does an artifact learn other classes, or images of another size?  Its head and positions anew, the rest as it is.

artifact → head and size → TrainLog → Report → artifact
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from vitcompress.artifact import file as artifact
from vitcompress.artifact.digest import sha256_of
from vitcompress.data import ImageSet
from vitcompress.data.classes import known_classes
from vitcompress.data.views import Views
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.distill.facts import run_facts
from vitcompress.distill.log import TrainLog
from vitcompress.distill.losses import LOSSES
from vitcompress.distill.matching import ComparedModel, Matching
from vitcompress.distill.student import check_student
from vitcompress.distill.teacher import Teacher, find_teacher
from vitcompress.errors import CheckpointError, Faults, RecipeError, VitcompressError, raise_faults
from vitcompress.families.find import family_named
from vitcompress.families.outputs import has_classes
from vitcompress.measure.accuracy import Evaluator
from vitcompress.measure.latency import measure_speed
from vitcompress.measure.macs import with_macs
from vitcompress.measure.results import Accuracy
from vitcompress.pipeline.adapt import adapt_student, adapted_source
from vitcompress.pipeline.budget import training_seconds
from vitcompress.pipeline.checks import (
    check_cache,
    check_kind_of,
    check_out,
    check_run,
    check_states,
    check_store,
    endless_epochs,
    files_read,
)
from vitcompress.pipeline.deliver import Stored, described, report_of, write_result
from vitcompress.pipeline.lessons import images_to_learn, new_head, settle_losses, source_as_teacher
from vitcompress.pipeline.produce import Lesson, carry_out, load_adapted, measure, train
from vitcompress.pipeline.settle import with_losses
from vitcompress.plans.make import measured_on
from vitcompress.plans.model import Plan
from vitcompress.pretrained.source import Source, build_model, empty_model
from vitcompress.quantize.layers import quantising
from vitcompress.recipe import Recipe, flag_of, save_interval
from vitcompress.recipe.compose import to_dict
from vitcompress.report.events import tell_plan
from vitcompress.report.gates import unreachable_gates
from vitcompress.report.model import Parent, Report, to_json
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.processes import alone, from_main, join
from vitcompress.surgery import apply_plan


def finetune(
    path: str | os.PathLike[str],
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    img_size: int | None = None,
    reporter: Reporter | None = None,
    command: str = "",
    started: float | None = None,
) -> Report:
    """Teach an artifact other classes, or its own on images of another size; what its blocks share stays shared.

    It has a new head, unless the images are of its own classes or have no labels. It learns from labels, and from a
    teacher: the one named, or the model it was made from where the classes are still that one's.

    Args:
        path: a file that `compress` or `finetune` wrote; not changed.
        recipe: images, teacher and training; `model` names the artifact, for the record.
        out: the new artifact's path; its folder exists.
        img_size: rows and columns of an image, in pixels; None to keep the size.
        reporter: told what is going on; silent by default.
        command: what was typed, for the report.
        started: when, in seconds since 1970, for `max_minutes`; now by default.

    Raises:
        VitcompressError: before any weight is loaded where that can be told; nothing is written then.
    """
    started = time.time() if started is None else started
    reporter = reporter or Reporter(quiet=True)
    check_kind_of(recipe, Recipe, 'Recipe(ModelRecipe("mini"), data=DataRecipe("images"))')
    job = _prepare(Path(path), recipe, Path(out), img_size, command)
    if job.lesson.images and job.lesson.images.labels is not None:
        reporter.say(
            f"new head for {job.num_classes} classes"
            if job.num_classes
            else f"{job.lesson.images.name}: of its own classes, so its head is kept"
        )
    set_seed(recipe.run.seed, device_specific=True)
    with job.accelerator.local_main_process_first():
        job, teacher = _with_teacher(job, reporter)
    student = artifact.load(path)
    adapt_student(student, job.plan, num_classes=job.num_classes, img_size=img_size)
    tell_plan(reporter, job.source.name, job.plan)
    checkpoints = Checkpoints.of(job.out, save_interval(recipe.run.save_every))
    if checkpoints and recipe.distill.steps != 0:
        job.begin(checkpoints, teacher, reporter)
    before = None if job.num_classes else job.measure(student, None, reporter)
    return carry_out(
        lambda: job.learn(student, teacher, checkpoints, started, reporter),
        lambda log, out: job.finish(student, teacher, before, log, out, reporter),
        job.out, recipe, checkpoints=checkpoints, accelerator=job.accelerator, reporter=reporter,
    )  # fmt: skip


def check(path: Path, recipe: Recipe, out: Path, *, img_size: int | None = None) -> None:
    """Find every fault that `finetune` would, before any weight is loaded, and join no other process.

    Raises:
        VitcompressError: there are some.
    """
    _prepare(path, recipe, out, img_size, "", joins=False)


@dataclass(frozen=True)
class _Job:
    """A request that has been checked, with what it names found.

    Attributes:
        parent: what the artifact says of itself.
        lineage: the files that the result is made from.
        source: the model with its new head and size.
        plan: with the sizes of that model.
        num_classes: K of the new head; None where the head is kept.
        classes: names of the classes; empty where they are not known.
        teacher: None where there is none.
        by_default: nobody named the teacher, so it may turn out not to be there.
    """

    lesson: Lesson
    out: Path
    command: str
    parent: artifact.Manifest
    lineage: tuple[Parent, ...]
    source: Source
    plan: Plan
    num_classes: int | None
    classes: tuple[str, ...]
    val: ImageSet | None
    teacher: Teacher | None
    by_default: bool
    accelerator: Accelerator
    notes: tuple[str, ...] = ()

    def begin(self, checkpoints: Checkpoints, teacher: nn.Module | None, reporter: Reporter) -> None:
        """Make room for the states of a new run, or make sure that the interrupted one is this."""
        recipe, digests = self.lesson.recipe, {"file.sha256": self.lineage[-1].sha256}
        if teacher is not None:
            digests["teacher.sha256"] = sha256_of(teacher.state_dict())
        facts = run_facts(
            to_dict(recipe), self.lesson.images, **digests, num_processes=self.accelerator.num_processes,
            torch=torch.__version__,
        )  # fmt: skip
        settled = checkpoints.resumed(facts, resume=recipe.run.resume, say=reporter.say)
        if settled is None and self.accelerator.is_main_process:
            checkpoints.begin(facts, {}, eager=False)

    @property
    def evaluator(self) -> Evaluator:
        """What models are evaluated with."""
        recipe = self.lesson.recipe
        return Evaluator(self.val, self.lesson.config, recipe.data, self.accelerator, recipe.distill.accumulate)

    def measure(self, student: nn.Module, teacher: nn.Module | None, reporter: Reporter) -> Accuracy | None:
        """Evaluate the student, next to its teacher where it has one; nothing where there is nothing to measure."""
        if teacher is None and (not has_classes(student) or self.val is None or self.val.labels is None):
            return None
        return measure(student, teacher, self.evaluator, reporter)

    def learn(
        self, student: nn.Module, teacher: nn.Module | None, checkpoints: Checkpoints | None, started: float,
        reporter: Reporter,
    ) -> TrainLog:  # fmt: skip
        """Train the student, in place."""
        recipe, how = self.lesson.recipe, self.lesson.recipe.store
        with quantising(student, how.kind, how.qat_fraction) as quantise:
            return train(
                student, teacher, self.lesson, blocks=family_named(self.plan.family).block_names(student),
                matrices=self.plan.matrices, fade=quantise, accelerator=self.accelerator, reporter=reporter,
                checkpoints=checkpoints, seconds=training_seconds(
                    recipe.distill.max_minutes, started, student, teacher, self.evaluator, baselines=False
                ),
            )  # fmt: skip

    def finish(
        self, student: nn.Module, teacher: nn.Module | None, before: Accuracy | None, log: TrainLog, out: Path,
        reporter: Reporter,
    ) -> Report:  # fmt: skip
        """Round, evaluate, write and verify; returns the report that went into the file. The main process writes."""
        device, config = self.accelerator.device, self.lesson.config
        stored = Stored.of(student, self.plan, self.lesson.recipe.store.kind)
        stored.round(student)
        accuracy = self.measure(student, teacher, reporter)
        if not self.accelerator.is_main_process:
            return self._of_main(None)
        whole = build_model(self.source).to(device).eval()  # how fast it is does not hang on its weights
        speed = measure_speed(student.to(device).eval(), whole, config["input_size"], device=device)
        report = report_of(
            stored, self.source, accuracy=accuracy, before=before, speed=speed, train=log, lineage=self.lineage,
            data=self.lesson.images.name if self.lesson.images and log.steps else None, command=self.command,
            notes=self._own_notes(log),
        )  # fmt: skip
        write_result(out, student, stored, self._manifest(report, stored), report, reporter)
        return self._of_main(report)

    def _of_main(self, report: Report | None) -> Report:
        found = from_main(report, self.accelerator)
        assert found is not None  # the main process made it
        return found

    def _manifest(self, report: Report, stored: Stored) -> artifact.Manifest:
        same = self.num_classes is None and self.source.model_args == self.parent.source["model_args"]
        return replace(
            self.parent,
            source=described(self.source),
            source_sha256=self.parent.source_sha256 if same else "",
            plan=stored.plan,
            data_config=self.lesson.config,
            recipe=to_dict(self.lesson.recipe),
            report=to_json(report),
            versions=report.versions,
            classes=self.classes,
            lineage=tuple(to_json(parent) for parent in self.lineage),
            store=stored.store,
        )

    def _own_notes(self, log: TrainLog) -> tuple[str, ...]:
        head = "Sizes and latencies of the teacher are those of the same model without sharing."
        if self.num_classes:
            head += f" The head is new, for {self.num_classes} classes, so there is no accuracy from before."
        return (head, *self.notes, *(self.lesson.comparison.notes if log.steps else ()))


def _with_teacher(job: _Job, reporter: Reporter) -> tuple[_Job, nn.Module | None]:
    """Load the teacher; where nobody named it and it is not to be had, labels alone must do.

    Raises:
        VitcompressError: there is no teacher, and no way to do without.
    """
    if job.teacher is None:
        return job, None
    try:
        teacher = job.teacher.load()
        if job.by_default and sha256_of(teacher.state_dict()) != job.parent.source_sha256:
            raise CheckpointError("these are other weights than the artifact was made from.")
    except VitcompressError as error:
        rest = {name: weight for name, weight in job.lesson.comparison.losses.items() if not LOSSES[name].teacher}
        if not job.by_default or not rest:
            raise
        note = f"Without the teacher {job.teacher.name}: {error}"
        reporter.say(note)
        recipe = with_losses(job.lesson.recipe, rest)
        lesson = replace(job.lesson, recipe=recipe, comparison=Matching(rest), teacher=None)
        return replace(job, lesson=lesson, teacher=None, notes=(*job.notes, note)), None
    loaded = replace(job.teacher, load=lambda: teacher)
    return job, load_adapted(loaded, job.lesson.config, job.lesson.comparison)


def _prepare(
    path: Path, recipe: Recipe, out: Path, img_size: int | None, command: str, *, joins: bool = True
) -> _Job:  # fmt: skip
    """Check what was asked for and find what it names, before any weight is loaded.

    Raises:
        VitcompressError: every fault that can be told by looking, at once.
    """
    faults = Faults()
    attempt = faults.attempt
    asked = recipe.teacher
    attempt(check_out, out, {str(path): path, **files_read(recipe)})
    attempt(check_states, out, recipe.run)
    attempt(check_run, recipe, starts=not joins)
    attempt(_check_stages, recipe)
    parent = attempt(artifact.read_manifest, path)
    teacher = attempt(find_teacher, asked) if asked.teacher else None
    if parent is None:
        faults.raise_as(RecipeError)
    if recipe.store.kind == "source":  # the file is its own source
        recipe = replace(recipe, store=replace(recipe.store, store=parent.store))
    attempt(check_store, recipe.store, recipe.distill)
    old = Source(**parent.source)
    old_classes: int = empty_model(old).num_classes  # type: ignore[assignment]
    known = known_classes(parent.classes, old.pretrained_cfg, old_classes)
    sets = attempt(images_to_learn, recipe.data, parent, known, num_classes=old_classes, seed=recipe.run.seed)
    images, val = sets or (None, None)
    faults.extend(endless_epochs(recipe, images))
    classes, num_classes = new_head(images, known)
    if asked.teacher is None and num_classes is None:
        teacher = source_as_teacher(parent)
    if recipe.gates.max_drop is not None and (val is None or val.labels is None or teacher is None):
        faults.add("--max-drop needs labelled images and a teacher.", "Give --val-data and --teacher.")
    if num_classes and recipe.distill.steps == 0:
        faults.add(f"--steps 0: the new head of {num_classes} classes would stay random.", "Train it.")
    source = attempt(adapted_source, old, num_classes=num_classes, img_size=img_size)
    lesson = None
    if source is not None and images is not None and (teacher or not asked.teacher):
        config = dict(parent.data_config)
        if img_size:
            config["input_size"] = (config["input_size"][0], img_size, img_size)
        lesson = attempt(_settle, path.name, source, teacher, recipe, images, classes, config, parent.plan)
    faults.raise_as(RecipeError)
    assert lesson is not None  # else there was a fault
    empty = empty_model(source)
    plan = with_macs(measured_on(parent.plan, empty, recipe.store.kind), empty, lesson.config["input_size"])
    hint = "What the file shares stays shared; --store int8 and int4 need fewer bytes."
    raise_faults(RecipeError, [(message, hint) for message, _ in unreachable_gates(plan.size, recipe.gates)])
    return _Job(
        lesson, out, command, parent, _lineage(path, parent), source, plan,
        num_classes, classes, val, teacher, asked.teacher is None,
        join(recipe.run, out.parent) if joins else alone(),
    )  # fmt: skip


def _settle(
    name: str, source: Source, teacher: Teacher | None, recipe: Recipe, images: ImageSet, classes: tuple[str, ...],
    config: dict[str, Any], plan: Plan,
) -> Lesson:  # fmt: skip
    """Settle what the student learns, and make sure that it can.

    Raises:
        VitcompressError: it cannot; every fault at once.
    """
    faults = Faults()
    attempt = faults.attempt
    model = empty_model(source)
    apply_plan(model, plan)
    student = ComparedModel(name, model, config["input_size"])
    attempt(Views, images, config, training=True, recipe=recipe.data, seed=0)
    comparison = attempt(settle_losses, student, teacher, recipe.distill, images, classes)
    if comparison is not None:
        attempt(check_cache, recipe, comparison.losses)
        recipe = with_losses(recipe, comparison.losses)
        attempt(check_student, model, family_named(plan.family).block_names(model), recipe.distill, name=name)
    faults.raise_as(RecipeError)
    taught = teacher is not None and any(LOSSES[name].teacher for name in comparison.losses)
    return Lesson(recipe, images, config, comparison, teacher.name if teacher and taught else None)


def _check_stages(recipe: Recipe) -> None:
    """Make sure that a recipe asks for nothing that the artifact has settled.

    Raises:
        RecipeError: it does; every such option at once.
    """
    asked, settled = to_dict(recipe), to_dict(Recipe(replace(recipe.model, checkpoint=None, model_arg={})))
    fades = ["--fade"] if recipe.distill.fade else []  # there are no matrices left to fade
    changed = fades + [
        flag_of(name)
        for stage in ("model", "plan", "start")
        for name, value in asked[stage].items()
        if value != settled[stage][name]
    ]
    if changed:
        raise RecipeError(f"finetune takes from the file what {', '.join(changed)} would change.", hint="Leave it out.")


def _lineage(path: Path, parent: artifact.Manifest) -> tuple[Parent, ...]:
    """The files that the result is made from, oldest first."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    older = tuple(Parent(**dict(each)) for each in parent.lineage)
    return (*older, Parent(path.name, sha256, str(parent.report.get("command", ""))))
