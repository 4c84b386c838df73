"""What happens in which order?  The only place where stages meet.

Recipe → Plan → student → TrainLog → Report → artifact
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from vitcompress import artifact
from vitcompress.classes import known_classes
from vitcompress.compare import Candidate, Comparison, compare, has_classes
from vitcompress.compose import to_dict
from vitcompress.console import Reporter
from vitcompress.data import ImageSet, open_sets, validation_folder
from vitcompress.errors import CheckpointError, DataError, RecipeError, VitcompressError, attempting, raise_faults
from vitcompress.evaluate import Accuracy, evaluate_pair, measure_speed
from vitcompress.fading import fading
from vitcompress.families import family_named, family_of
from vitcompress.initialize import needs_images, start_student
from vitcompress.macs import with_macs
from vitcompress.plan import Plan, make_plan
from vitcompress.prepare import bundle_of, check_device, check_out, missing_images
from vitcompress.produce import (
    Lesson,
    described,
    load_adapted,
    measure,
    notes_on,
    train,
    versions,
    write_result,
)
from vitcompress.recipe import DataRecipe, ModelRecipe, PlanRecipe, Recipe
from vitcompress.report import SCHEMA_VERSION, Report, to_json
from vitcompress.source import Source, clone, data_config, empty_model, load_teacher, resolve, sha256_of
from vitcompress.surgery import apply_plan
from vitcompress.teacher import Teacher, find_teacher
from vitcompress.training import check_student
from vitcompress.trainlog import DivergedError, TrainLog
from vitcompress.views import Views, check_readable, evaluation_loader, random_views


def plan(model: ModelRecipe, recipe: PlanRecipe) -> Plan:
    """Decide what would be shared; loads no weights.

    Args:
        model: the teacher.
        recipe: what to share.
    """
    empty = empty_model(resolve(model))
    found = make_plan(empty, recipe, name=model.model)
    return with_macs(found, empty, data_config(empty, model)["input_size"])


def family_name(model: ModelRecipe) -> str:
    """The family of a model, by name; loads no weights.

    Raises:
        VitcompressError: there is no such model, or none that can be compressed.
    """
    return family_of(empty_model(resolve(model)), model.model).name


def dry_run(recipe: Recipe) -> tuple[Plan, tuple[str, ...]]:
    """Check all of a recipe that can be told without weights, images and the machine that will run it.

    Args:
        recipe: what would be done.

    Returns:
        What would be shared, and what the user should know of the distillation.

    Raises:
        VitcompressError: every fault at once.
    """
    faults: list[tuple[str, str]] = []
    attempt = attempting(faults)
    settled = _settle(recipe, attempt)
    if settled.config:
        attempt(random_views, settled.config, recipe.data)
    raise_faults(RecipeError, faults)
    return settled.plan, settled.comparison.notes


def compress(
    recipe: Recipe, out: str | os.PathLike[str], *, reporter: Reporter | None = None, command: str = ""
) -> Report:
    """Compress a model: plan, surgery, start, distillation, evaluation, a verified file and its report.

    Writes `out`, and beside it `<stem>.report.json`, `<stem>.report.md` and, where two models have a top-1, its picture
    `<stem>.report.svg`; each replaces an older one only when whole.

    Args:
        recipe: what to do.
        out: the artifact's path; its folder exists.
        reporter: told what is going on; silent by default.
        command: what was typed, for the report.

    Raises:
        VitcompressError: before any weight is loaded where the recipe shows it; nothing is written then.
    """
    reporter = reporter or Reporter(quiet=True)
    job = _prepare(recipe, Path(out), command)
    set_seed(recipe.run.seed)
    reporter.say(f"{job.source.name}: {job.plan.size.teacher_params:,} → {job.plan.size.student_params:,} parameters")
    teacher = load_teacher(job.source)
    student = clone(teacher)
    apply_plan(student, job.plan)
    job.start(student, teacher)
    try:
        log = job.distill(student, teacher, reporter)
    except DivergedError as error:
        kept = job.out.with_name(f"{job.out.stem}.last-good{job.out.suffix}")
        job.finish(student, teacher, error.log, kept, reporter)
        raise DivergedError(f"{error} The last good state is in {kept}.", hint=error.hint) from error
    return job.finish(student, teacher, log, job.out, reporter)


def evaluate(
    path: str | os.PathLike[str],
    recipe: DataRecipe,
    *,
    teacher: ModelRecipe | None = None,
    checkpoint: Path | None = None,
    reporter: Reporter | None = None,
) -> Accuracy:
    """Measure an artifact on images, next to its teacher where that can be had.

    Args:
        path: the artifact.
        recipe: `data` names the images; of a folder with train/ and val/ in it, val/ is taken.
        teacher: compare with this model instead of the artifact's source.
        checkpoint: weights of the source; no path is ever taken from the artifact itself.
        reporter: told why there is no teacher.
    """
    reporter = reporter or Reporter(quiet=True)
    manifest = artifact.read_manifest(Path(path))
    student = artifact.load(path)
    name = str(manifest.source["name"])
    images = _images_to_evaluate(recipe, manifest, student.num_classes)  # type: ignore[arg-type]
    try:
        if teacher is None and checkpoint is None and not manifest.source_sha256:
            raise CheckpointError("the file was fine-tuned: its source has another head or another image size.")
        if teacher is None and checkpoint is None and ":" in name:
            raise CheckpointError("the file names a place to fetch its teacher from, which is not trusted.")
        reference = load_teacher(resolve(teacher or ModelRecipe(name, checkpoint, dict(manifest.source["model_args"]))))
        if teacher is None and sha256_of(reference.state_dict()) != manifest.source_sha256:
            raise CheckpointError("these are other weights than the artifact was made from.")
    except VitcompressError as error:
        if teacher is not None or checkpoint is not None or not has_classes(student):
            raise  # features can only be compared
        reporter.say(f"Without the teacher: {error} {error.hint}")
        reference = None
    device = Accelerator().device
    return evaluate_pair(
        student.to(device),
        reference.to(device) if reference else None,
        evaluation_loader(images, manifest.data_config, recipe),
        name=images.name,
        device=device,
        skip_bad_images=recipe.skip_bad_images,
        features=not has_classes(student),
    )


def _images_to_evaluate(recipe: DataRecipe, manifest: artifact.Manifest, num_classes: int) -> ImageSet:
    folder = validation_folder(recipe.data) if recipe.data else None
    classes = known_classes(manifest.classes, manifest.source["pretrained_cfg"], num_classes)
    _, images = open_sets(
        replace(recipe, data=None, val_data=folder), bundle=bundle_of(str(manifest.source["name"]), manifest.classes),
        num_classes=num_classes, seed=0, classes=classes,
    )  # fmt: skip
    if images is None:
        raise DataError("There are no images to evaluate on.", hint="Give --data DIR.")
    return images


@dataclass(frozen=True)
class _Job:
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
    comparison: Comparison
    accelerator: Accelerator

    def start(self, student: nn.Module, teacher: nn.Module) -> None:
        """Set the student's starting weights, in place."""
        start_student(student, teacher, self.plan, self._calibration, self.recipe.start.start)

    def _calibration(self) -> Any:
        assert self.train is not None  # _prepare saw to it
        count = min(len(self.train), self.recipe.start.calibration_images)
        chosen = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.recipe.run.seed))[:count]
        recipe = replace(self.recipe.data, batch_size=min(32, self.recipe.data.batch_size))
        seen = 0
        for batch in evaluation_loader(self.train.subset(chosen.tolist(), "calibration"), self.config, recipe):
            check_readable(batch, skip=recipe.skip_bad_images)
            if len(batch.labels):
                seen += len(batch.labels)
                yield batch.images
        if seen == 0:
            raise DataError(f"{self.train.name}: not one calibration image could be read.")

    def distill(self, student: nn.Module, source: nn.Module, reporter: Reporter) -> TrainLog:
        """Train the student, in place, to do what the teacher does: the source, if no other is named."""
        student.to(self.accelerator.device)  # before the source's matrices are laid beside it
        teacher = load_adapted(self.teacher, self.config, self.comparison) if self.teacher else source
        with fading(student, source, self.plan, self.recipe.distill.fade) as fade:
            return train(
                student, teacher, self._lesson(), blocks=family_named(self.plan.family).block_names(source),
                matrices=self.plan.matrices, fade=fade, accelerator=self.accelerator, reporter=reporter,
            )  # fmt: skip

    def _lesson(self) -> Lesson:
        name = self.teacher.name if self.teacher else self.source.name
        return Lesson(self.recipe, self.train, self.config, self.comparison, name)

    def finish(self, student: nn.Module, teacher: nn.Module, log: TrainLog, out: Path, reporter: Reporter) -> Report:
        """Evaluate, write and verify; returns the report that went into the file."""
        device = self.accelerator.device
        accuracy = measure(
            student, teacher, self.val, self.config, self.recipe.data, device=device, reporter=reporter
        )  # fmt: skip
        report = Report(
            schema_version=SCHEMA_VERSION,
            model=self.source.name,
            family=self.plan.family,
            groups=tuple(len(group.blocks) for group in self.plan.groups),
            transforms=self.plan.transforms,
            size=self.plan.size,
            accuracy=accuracy,
            speed=measure_speed(student, teacher, self.config["input_size"], device=device),
            train=log,
            data=self.train.name if self.train and log.steps else None,
            versions=versions(),
            command=self.command,
            notes=notes_on(self.plan) + (self._teacher_notes() if log.steps else ()),
            made_of=self.plan.groups,
        )
        manifest = artifact.Manifest(
            source=described(self.source),
            source_sha256=sha256_of(teacher.state_dict()),
            plan=self.plan,
            data_config=self.config,
            recipe=to_dict(self.recipe),
            report=to_json(report),
            versions=report.versions,
            classes=tuple(self.source.pretrained_cfg.get("label_names", ()))
            or (self.train.classes if self.train else ()),
        )
        write_result(out, student, manifest, report, reporter)
        return report

    def _teacher_notes(self) -> tuple[str, ...]:
        """What a reader of the report must know where the student learned from another model."""
        if self.teacher is None:
            return self.comparison.notes
        taught = f"The student learned from {self.teacher.name}; it is compared with {self.source.name} all the same."
        return (taught, *self.comparison.notes)


def _prepare(recipe: Recipe, out: Path, command: str) -> _Job:
    """Check a recipe and find what it names, before any weight is loaded.

    Raises:
        VitcompressError: every fault that can be told by looking, at once.
    """
    faults: list[tuple[str, str]] = []
    attempt = attempting(faults)
    attempt(check_out, out, {"--checkpoint": recipe.model.checkpoint})
    attempt(check_device, recipe.run.device)
    if recipe.model.checkpoint is not None and not recipe.model.checkpoint.exists():
        faults.append((f"--checkpoint {recipe.model.checkpoint} does not exist.", ""))
    settled = _settle(recipe, attempt)
    source, model, config = settled.source, settled.model, settled.config
    train = val = None
    if model is not None and hasattr(model, "num_classes"):
        sets = attempt(
            open_sets, recipe.data, bundle=bundle_of(source.name), num_classes=model.num_classes,
            seed=recipe.run.seed, classes=known_classes((), source.pretrained_cfg, model.num_classes),
        )  # fmt: skip
        train, val = sets or (None, None)
        if sets is not None:
            fitted = settled.plan is not None and needs_images(settled.plan, recipe.start.start)
            faults += missing_images(recipe, train, val, fitted=fitted)
        if config and train is not None:
            attempt(Views, train, config, training=True, recipe=recipe.data, seed=0)
    raise_faults(RecipeError, faults)
    accelerator = Accelerator(cpu=recipe.run.device == "cpu")
    assert settled.comparison is not None  # else there was a fault
    recipe = replace(recipe, distill=replace(recipe.distill, loss=dict(settled.comparison.losses)))
    return _Job(
        recipe, out, command, source, settled.plan, config, train, val, settled.teacher, settled.comparison, accelerator
    )


@dataclass(frozen=True)
class _Settled:
    """What a recipe's names stand for, without weights and images; None where there is a fault."""

    source: Any
    model: Any
    plan: Any
    config: Any
    teacher: Any
    comparison: Any


def _settle(recipe: Recipe, attempt: Any) -> _Settled:
    """Find model, plan and teacher, and what of them is compared, each step by `attempt`."""
    source = attempt(resolve, recipe.model)
    model = attempt(empty_model, source) if source else None
    teacher = attempt(find_teacher, recipe.teacher) if recipe.teacher.teacher else None
    found: Any = None
    config: Any = None
    comparison = None
    if model is not None:
        found = attempt(make_plan, model, recipe.plan, name=recipe.model.model)
        config = attempt(data_config, model, recipe.model)
    if model is not None and found and config:
        found = with_macs(found, model, config["input_size"])
        blocks = family_named(found.family).block_names(model)
        attempt(check_student, model, blocks, recipe.distill, name=recipe.model.model)
        if teacher or not recipe.teacher.teacher:
            built = clone(model)
            apply_plan(built, found)
            student, own = (Candidate(source.name, each, config["input_size"]) for each in (built, model))
            comparison = attempt(compare, student, teacher.candidate if teacher else own, recipe.distill)
    return _Settled(source, model, found, config, teacher, comparison)
