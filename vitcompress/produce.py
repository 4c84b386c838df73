"""How does what was asked for get done?  What all commands that write a file have in common: train, measure, write."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vitcompress import artifact
from vitcompress.checkpoints import Checkpoints, images_digest
from vitcompress.compare import Comparison
from vitcompress.compose import to_dict
from vitcompress.console import Reporter
from vitcompress.data import ImageSet
from vitcompress.digest import sha256_of
from vitcompress.distill import distill
from vitcompress.evaluation import Accuracy, Evaluator
from vitcompress.mixing import Mixing
from vitcompress.plans import Plan, weighed
from vitcompress.quantize import num_bytes
from vitcompress.recipe import DEFAULT_STEPS, Recipe
from vitcompress.report import Report, to_json, to_markdown, to_svg
from vitcompress.source import Source
from vitcompress.stored import round_to, stored_tensors
from vitcompress.teacher import Teacher, adapt_inputs
from vitcompress.teacher_cache import TeacherCache
from vitcompress.trainlog import DivergedError, TrainLog
from vitcompress.views import Batch, Share, share_of, training_loader

PROBE_IMAGES = 8
_DECIDE_VIEWS = ("crop_min", "hflip", "auto_augment", "erase", "repeats", "mixup", "cutmix")


@dataclass(frozen=True)
class Lesson:
    """What a student learns, from whom, and on which images.

    Attributes:
        recipe: how.
        images: None where it learns nothing.
        config: timm's data config of the student.
        comparison: the losses, and where the two models are read.
        teacher: what the teacher is called; None where no loss looks at one.
    """

    recipe: Recipe
    images: ImageSet | None
    config: dict[str, Any]
    comparison: Comparison
    teacher: str | None

    def named(self, log: TrainLog) -> TrainLog:
        """The log, with whom was learned from and by which losses."""
        return replace(log, teacher=self.teacher, losses=dict(self.comparison.losses)) if log.steps else log


def train(
    student: nn.Module,
    teacher: nn.Module | None,
    lesson: Lesson,
    *,
    blocks: Sequence[str],
    matrices: Collection[str],
    fade: Callable[[float], None],
    accelerator: Accelerator,
    reporter: Reporter,
    checkpoints: Checkpoints | None = None,
    seconds: float | None = None,
) -> TrainLog:
    """Train the student, in place.

    Args:
        student: any model.
        teacher: takes the student's views; None where no loss looks at one.
        lesson: what it learns.
        blocks: names of the student's blocks.
        matrices: names of the matrices that its blocks share, for the optimizer.
        fade: told of the share of the training that is over, before each step.
        accelerator: decides device and processes.
        reporter: shows how it goes.
        checkpoints: where the state is kept; None for nowhere.
        seconds: length in time, where the recipe counts in minutes.
    """
    steps, images = num_steps(lesson), lesson.images
    if steps == 0 or images is None:
        return TrainLog()
    recipe, seed = lesson.recipe, lesson.recipe.run.seed
    share = share_of(accelerator, accumulate=recipe.distill.accumulate)

    def batches(start: int) -> Iterable[Batch]:
        return training_loader(
            images, lesson.config, recipe.data, seed=seed, num_steps=steps, start=start, share=share
        )  # fmt: skip

    with reporter.training() as ticker, _divergence_of(lesson):
        log = distill(
            student,
            teacher,
            batches,
            recipe.distill,
            blocks=blocks,
            comparison=lesson.comparison,
            mixing=Mixing(
                mixup=recipe.data.mixup,
                cutmix=recipe.data.cutmix,
                num_classes=student.num_classes if "labels" in lesson.comparison.losses else None,  # type: ignore[arg-type]
                smoothing=recipe.distill.label_smoothing,
                seed=seed,
            ),
            matrices=matrices,
            fade=fade,
            accelerator=accelerator,
            ticker=ticker,
            input_size=lesson.config["input_size"],
            num_steps=steps,
            seconds=seconds,
            seed=seed,
            skip_bad_images=recipe.data.skip_bad_images,
            checkpoints=checkpoints,
            cache=_teacher_cache(lesson, teacher, student.num_classes, share, accelerator),  # type: ignore[arg-type]
            compiled=recipe.run.compile,
        )
    return lesson.named(log)


@contextmanager
def _divergence_of(lesson: Lesson) -> Iterator[None]:
    """Let the log of a training that diverged say what it was of."""
    try:
        yield
    except DivergedError as error:
        error.log = lesson.named(error.log)
        raise


def _teacher_cache(
    lesson: Lesson, teacher: nn.Module | None, num_classes: int, share: Share, accelerator: Accelerator
) -> TeacherCache | None:
    """What the teacher said of the lesson's views in earlier runs; None where nobody asked for that."""
    recipe, steps, images = lesson.recipe, num_steps(lesson), lesson.images
    if recipe.run.cache_teacher is None or teacher is None or steps is None or images is None:
        return None
    fields = to_dict(recipe)["data"]
    facts = {
        "teacher.sha256": sha256_of(teacher.state_dict()), "training images": images_digest(images),
        "--seed": recipe.run.seed, "--precision": recipe.run.precision, "data config": lesson.config,
        **{f"--{name.replace('_', '-')}": fields[name] for name in _DECIDE_VIEWS},
    }  # fmt: skip
    with accelerator.local_main_process_first():
        return TeacherCache(
            recipe.run.cache_teacher, facts, num_steps=steps, batch_size=recipe.data.batch_size,
            num_classes=num_classes, share=share,
        )  # fmt: skip


def num_steps(lesson: Lesson) -> int | None:
    """Length of the training; None where it is counted in minutes."""
    recipe = lesson.recipe.distill
    if recipe.max_minutes is not None:
        return None
    if recipe.epochs is not None and lesson.images is not None:
        return max(1, round(recipe.epochs * len(lesson.images) / lesson.recipe.data.batch_size))
    return DEFAULT_STEPS if recipe.steps is None else recipe.steps


def load_adapted(teacher: Teacher, config: dict[str, Any], comparison: Comparison) -> nn.Module:
    """Load a teacher that takes the student's views.

    Args:
        teacher: what to load.
        config: timm's data config of the views.
        comparison: says whether views must be resized.
    """
    model = teacher.load()
    adapt_inputs(model, teacher.config, config, comparison.image_size)
    return model


def measure(
    student: nn.Module,
    teacher: nn.Module | None,
    evaluator: Evaluator,
    reporter: Reporter,
) -> Accuracy | None:
    """Evaluate a student next to its teacher; None where there are no images.

    Args:
        student: moved to the accelerator's device, in eval mode from now on.
        teacher: the same; None where there is none.
        evaluator: has the images.
        reporter: told of it.
    """
    for model in filter(None, (student, teacher)):
        model.to(evaluator.accelerator.device).eval()
    if evaluator.images is not None:
        reporter.say(f"evaluating on {evaluator.images.name}")
    return evaluator(student, teacher)


@dataclass(frozen=True)
class Stored:
    """A student as its file holds it.

    Attributes:
        tensors: what the file holds, by name.
        plan: with the bytes that they take.
        store: how they are held.
    """

    tensors: Mapping[str, Tensor]
    plan: Plan
    store: str

    @classmethod
    def of(cls, student: nn.Module, plan: Plan, store: str) -> Stored:
        """What a file holds of `student`, which is left as it is."""
        tensors = stored_tensors(student, store)
        return cls(tensors, weighed(plan, num_bytes(tensors)), store)

    def round(self, student: nn.Module) -> None:
        """Set the student's parameters to what the file gives back, in place: what is measured is what is stored."""
        round_to(student, self.tensors, self.store)


def write_result(
    out: Path, student: nn.Module, stored: Stored, manifest: artifact.Manifest, report: Report, reporter: Reporter
) -> None:
    """Write a verified artifact, and beside it its two reports and their picture, where there is one to draw.

    Args:
        out: the artifact.
        student: in eval mode, rounded to `stored`.
        stored: what the artifact holds of it.
        manifest: what the artifact says of itself.
        report: the same as in the manifest.
        reporter: told of it.
    """
    # noise does to compare outputs on, and is always at hand
    size = manifest.data_config["input_size"]
    probe = torch.randn(PROBE_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    artifact.write(out, student, manifest, probe, stored=stored.tensors)
    _write_text(out.with_name(f"{out.stem}.report.json"), json.dumps(to_json(report), indent=2) + "\n")
    picture, svg = picture_of(out), to_svg(report)
    if svg is not None:
        _write_text(picture, svg)
    else:  # an older one would be of other numbers
        picture.unlink(missing_ok=True)
    _write_text(out.with_name(f"{out.stem}.report.md"), to_markdown(report, picture=picture.name if svg else None))
    reporter.say(f"wrote {out} ({out.stat().st_size:,} bytes), verified")


def picture_of(out: Path) -> Path:
    """Where the picture of an artifact's report lies, if it has one."""
    return out.with_name(f"{out.stem}.report.svg")


def _write_text(path: Path, text: str) -> None:
    with artifact.replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def notes_on(plan: Plan) -> tuple[str, ...]:
    """What a reader of any report must know of sharing."""
    size, notes = plan.size, []
    if size.teacher_macs is None or size.student_macs is None or size.student_macs >= size.teacher_macs:
        notes.append("Sharing makes a model smaller, not faster: every block is still computed.")
    for transform, name in (("heads", "Head mixing needs"), ("rpe", "The position term on keys needs")):
        if transform in plan.transforms:
            notes.append(f"{name} the attention maps, so it gives up fused attention (--transforms mlp keeps it).")
    return tuple(notes)


def described(source: Source) -> dict[str, Any]:
    """What an artifact says of its source: what it is, not where its weights lay."""
    places = ("file", "source", "url", "hf_hub_id")
    return {
        "name": source.name,
        "architecture": source.architecture,
        "model_args": source.model_args,
        "pretrained_cfg": {key: value for key, value in source.pretrained_cfg.items() if key not in places},
    }


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("vitcompress", "torch", "timm", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout on the path, not installed
            found[name] = "unknown"
    return found


def command_line(arguments: list[str]) -> str:
    """What was typed, as a shell would take it again."""
    return shlex.join(["vitcompress", *arguments])
