"""What happens in which order?  The only place where stages meet.

Recipe → Plan → student → TrainLog → Report → artifact
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from vitcompress import artifact
from vitcompress.bundled import FASHION_VIT, Bundle
from vitcompress.compare import Candidate, Comparison, compare
from vitcompress.console import Reporter
from vitcompress.data import (
    ImageSet,
    Views,
    check_readable,
    evaluation_loader,
    open_sets,
    random_views,
    training_loader,
    validation_folder,
)
from vitcompress.distill import distill
from vitcompress.errors import CheckpointError, DataError, RecipeError, VitcompressError, attempting, raise_faults
from vitcompress.evaluate import Accuracy, evaluate_pair, measure_speed
from vitcompress.fading import fading
from vitcompress.families import family_named, family_of
from vitcompress.initialize import STARTS
from vitcompress.mixing import Mixing
from vitcompress.plan import Plan, make_plan
from vitcompress.recipe import DEFAULT_STEPS, DataRecipe, ModelRecipe, PlanRecipe, Recipe, to_dict
from vitcompress.report import SCHEMA_VERSION, Report, to_json, to_markdown
from vitcompress.source import Source, clone, data_config, empty_model, load_teacher, resolve, sha256_of
from vitcompress.surgery import apply_plan
from vitcompress.teacher import Teacher, adapt_inputs, find_teacher
from vitcompress.training import check_student
from vitcompress.trainlog import DivergedError, TrainLog

PROBE_IMAGES = 8


def plan(model: ModelRecipe, recipe: PlanRecipe) -> Plan:
    """Decide what would be shared; loads no weights.

    Args:
        model: the teacher.
        recipe: what to share.
    """
    return make_plan(empty_model(resolve(model)), recipe, name=model.model)


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

    Writes `out`, and beside it `<stem>.report.json` and `<stem>.report.md`; each replaces an older one only when whole.

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
    images = _images_to_evaluate(recipe, name, student.num_classes)  # type: ignore[arg-type]
    try:
        if teacher is None and checkpoint is None and ":" in name:
            raise CheckpointError("the file names a place to fetch its teacher from, which is not trusted.")
        reference = load_teacher(resolve(teacher or ModelRecipe(name, checkpoint, dict(manifest.source["model_args"]))))
        if teacher is None and sha256_of(reference.state_dict()) != manifest.source_sha256:
            raise CheckpointError("these are other weights than the artifact was made from.")
    except VitcompressError as error:
        if teacher is not None or checkpoint is not None:
            raise
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
    )


def _images_to_evaluate(recipe: DataRecipe, model: str, num_classes: int) -> ImageSet:
    folder = validation_folder(recipe.data) if recipe.data else None
    _, images = open_sets(
        replace(recipe, data=None, val_data=folder), bundle=_bundle(model), num_classes=num_classes, seed=0
    )
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
        method = self.recipe.start.start
        STARTS[method](student, teacher, self.plan, self._calibration() if method == "calibrated" else ())

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
        steps = self._num_steps()
        if steps == 0 or self.train is None:
            return TrainLog()
        recipe, seed, minutes = self.recipe, self.recipe.run.seed, self.recipe.distill.max_minutes
        student.to(self.accelerator.device)  # before the source's matrices are laid beside it
        with (
            reporter.training() as ticker,
            fading(student, source, self.plan, recipe.distill.fade) as fade,
        ):
            log = distill(
                student,
                self._load_teacher() if self.teacher else source,
                training_loader(self.train, self.config, recipe.data, seed=seed, num_steps=steps),
                recipe.distill,
                blocks=family_named(self.plan.family).block_names(source),
                comparison=self.comparison,
                mixing=Mixing(
                    mixup=recipe.data.mixup,
                    cutmix=recipe.data.cutmix,
                    num_classes=student.num_classes if "labels" in self.comparison.losses else None,  # type: ignore[arg-type]
                    smoothing=recipe.distill.label_smoothing,
                    seed=seed,
                ),
                matrices=self.plan.matrices,
                fade=fade,
                accelerator=self.accelerator,
                ticker=ticker,
                num_steps=steps,
                seconds=60 * minutes if minutes else None,
                seed=seed,
                skip_bad_images=recipe.data.skip_bad_images,
            )
        if log.steps == 0:
            raise DataError(f"{self.train.name}: not one image could be read.")
        return log

    def _load_teacher(self) -> nn.Module:
        assert self.teacher is not None
        teacher = self.teacher.load()
        adapt_inputs(teacher, self.teacher.config, self.config, self.comparison.image_size)
        return teacher

    def _num_steps(self) -> int | None:
        recipe = self.recipe.distill
        if recipe.max_minutes is not None:
            return None
        if recipe.epochs is not None and self.train is not None:
            return max(1, round(recipe.epochs * len(self.train) / self.recipe.data.batch_size))
        return DEFAULT_STEPS if recipe.steps is None else recipe.steps

    def finish(self, student: nn.Module, teacher: nn.Module, log: TrainLog, out: Path, reporter: Reporter) -> Report:
        """Evaluate, write and verify; returns the report that went into the file."""
        if log.steps:
            name = self.teacher.name if self.teacher else self.source.name
            log = replace(log, teacher=name, losses=dict(self.comparison.losses))
        device = self.accelerator.device
        student.to(device).eval(), teacher.to(device).eval()
        accuracy = None
        if self.val is not None:
            reporter.say(f"evaluating on {self.val.name}")
            accuracy = evaluate_pair(
                student, teacher, evaluation_loader(self.val, self.config, self.recipe.data), name=self.val.name,
                device=device, skip_bad_images=self.recipe.data.skip_bad_images,
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
            versions=_versions(),
            command=self.command,
            notes=_notes(self.plan) + (self._teacher_notes() if log.steps else ()),
        )
        manifest = artifact.Manifest(
            source={
                "name": self.source.name,
                "architecture": self.source.architecture,
                "model_args": self.source.model_args,
                "pretrained_cfg": _portable(self.source.pretrained_cfg),
            },
            source_sha256=sha256_of(teacher.state_dict()),
            plan=self.plan,
            data_config=self.config,
            recipe=to_dict(self.recipe),
            report=to_json(report),
            versions=report.versions,
        )
        artifact.write(out, student, manifest, self._probe())
        _write_text(out.with_name(f"{out.stem}.report.json"), json.dumps(to_json(report), indent=2) + "\n")
        _write_text(out.with_name(f"{out.stem}.report.md"), to_markdown(report))
        reporter.say(f"wrote {out} ({out.stat().st_size:,} bytes), verified")
        return report

    def _teacher_notes(self) -> tuple[str, ...]:
        """What a reader of the report must know where the student learned from another model."""
        if self.teacher is None:
            return self.comparison.notes
        taught = f"The student learned from {self.teacher.name}; it is compared with {self.source.name} all the same."
        return (taught, *self.comparison.notes)

    def _probe(self) -> Tensor:
        """A few images to compare logits on: noise does, and is always at hand."""
        return torch.randn(PROBE_IMAGES, *self.config["input_size"], generator=torch.Generator().manual_seed(0))


def _prepare(recipe: Recipe, out: Path, command: str) -> _Job:
    """Check a recipe and find what it names, before any weight is loaded.

    Raises:
        VitcompressError: every fault that can be told by looking, at once.
    """
    faults: list[tuple[str, str]] = []
    attempt = attempting(faults)
    attempt(_check_out, out, recipe.model.checkpoint)
    attempt(_check_device, recipe.run.device)
    if recipe.model.checkpoint is not None and not recipe.model.checkpoint.exists():
        faults.append((f"--checkpoint {recipe.model.checkpoint} does not exist.", ""))
    settled = _settle(recipe, attempt)
    source, model, config = settled.source, settled.model, settled.config
    train = val = None
    if model is not None and hasattr(model, "num_classes"):
        sets = attempt(
            open_sets, recipe.data, bundle=_bundle(source.name), num_classes=model.num_classes, seed=recipe.run.seed
        )
        train, val = sets or (None, None)
        if sets is not None:
            faults += _missing_images(recipe, train, val)
        if config and train is not None:
            attempt(Views, train, config, training=True, recipe=recipe.data, seed=0)
    raise_faults(RecipeError, faults)
    accelerator = Accelerator(cpu=recipe.run.device == "cpu")
    assert settled.comparison is not None  # else there was a fault
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
        blocks = family_named(found.family).block_names(model)
        attempt(check_student, model, blocks, recipe.distill, name=recipe.model.model)
        if teacher or not recipe.teacher.teacher:
            student = Candidate(source.name, model, config["input_size"])
            comparison = attempt(compare, student, teacher.candidate if teacher else student, recipe.distill)
    return _Settled(source, model, found, config, teacher, comparison)


def _missing_images(recipe: Recipe, train: ImageSet | None, val: ImageSet | None) -> list[tuple[str, str]]:
    """What the recipe wants images for and has none."""
    faults = []
    if train is None and recipe.distill.steps != 0:
        faults.append(("Distillation needs training images.", "Give --data DIR, or --steps 0 to convert only."))
    if train is None and recipe.start.start == "calibrated":
        faults.append(("--start calibrated needs images.", "Give --data DIR, or another --start."))
    if recipe.distill.loss.get("labels") and train is not None and train.labels is None:
        faults.append(("--loss labels needs labelled images.", "Give --data DIR with class folders."))
    if recipe.gates.max_drop is not None and (val is None or val.labels is None):
        faults.append(("--max-drop needs labelled images.", "Give --val-data DIR with class folders."))
    return faults


def _check_out(out: Path, checkpoint: Path | None) -> None:
    folder = out.parent
    if not folder.is_dir():
        raise RecipeError(f"--out {out}: the folder {folder} does not exist.", hint=f"mkdir -p {folder}")
    if out.is_dir():
        raise RecipeError(f"--out {out} is a folder.", hint="Name a file, like mini.safetensors.")
    if checkpoint is not None and out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise RecipeError(f"--out {out} would overwrite --checkpoint.", hint="Name another file.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(f"--out {out}: the folder {folder} cannot be written to: {error.strerror}.") from error


def _check_device(device: str) -> None:
    available: dict[str, Any] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device in available and not available[device]():
        raise RecipeError(f"--device {device} is not there.", hint="--device auto takes what there is.")


def _bundle(name: str) -> Bundle | None:
    return FASHION_VIT if name == FASHION_VIT.name else None


def _portable(cfg: dict[str, Any]) -> dict[str, Any]:
    """What of a pretrained config describes the weights, not where they lay."""
    return {key: value for key, value in cfg.items() if key not in ("file", "source", "url", "hf_hub_id")}


def _notes(plan: Plan) -> tuple[str, ...]:
    notes = ["Sharing makes a model smaller, not faster: every block is still computed."]
    for transform, name in (("heads", "Head mixing needs"), ("rpe", "The position term on keys needs")):
        if transform in plan.transforms:
            notes.append(f"{name} the attention maps, so it gives up fused attention (--transforms mlp keeps it).")
    return tuple(notes)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vitcompress", "torch", "timm", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout on the path, not installed
            found[name] = "unknown"
    return found


def _write_text(path: Path, text: str) -> None:
    with artifact.replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def command_line(arguments: list[str]) -> str:
    """What was typed, as a shell would take it again."""
    return shlex.join(["vitcompress", *arguments])
