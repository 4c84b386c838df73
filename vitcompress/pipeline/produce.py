"""How does what was asked for get done?  What all commands that train have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from vitcompress.artifact.digest import sha256_of
from vitcompress.data import ImageSet
from vitcompress.data.mixing import Mixing
from vitcompress.data.views import Batch, Share, share_of, training_loader
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.distill.facts import images_digest
from vitcompress.distill.log import TrainLog
from vitcompress.distill.loop import distill
from vitcompress.distill.matching import Matching
from vitcompress.distill.run import DivergedError
from vitcompress.distill.settings import TrainSettings
from vitcompress.distill.teacher import Teacher, adapt_inputs
from vitcompress.distill.teacher_cache import TeacherCache
from vitcompress.measure.accuracy import Evaluator
from vitcompress.measure.results import Accuracy
from vitcompress.recipe import DEFAULT_STEPS, Recipe, flag_of
from vitcompress.recipe.compose import to_dict
from vitcompress.report.events import tell_result
from vitcompress.report.model import Report
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.processes import part, tracking

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
    comparison: Matching
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
    same_as: nn.Module | None = None,
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
        same_as: computes what the teacher does, and caches go by its weights; None where that is the teacher.
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

    cache = None
    if teacher is not None:
        num_classes: Any = student.num_classes
        cache = _teacher_cache(lesson, same_as or teacher, num_classes, share, accelerator)
    settings = TrainSettings(
        recipe.distill,
        lesson.comparison,
        blocks=blocks,
        matrices=matrices,
        input_size=lesson.config["input_size"],
        num_steps=steps,
        seconds=seconds,
        seed=seed,
        mixing=Mixing(
            mixup=recipe.data.mixup,
            cutmix=recipe.data.cutmix,
            num_classes=student.num_classes if "labels" in lesson.comparison.losses else None,  # type: ignore[arg-type]
            smoothing=recipe.distill.label_smoothing,
            seed=seed,
        ),
        skip_bad_images=recipe.data.skip_bad_images,
        checkpoints=checkpoints,
        teacher_cache=cache,
        compiled=recipe.run.compile,
        before_step=fade,
    )
    with reporter.training() as ticker, _divergence_of(lesson):
        log = distill(student, teacher, batches, settings, accelerator=accelerator, ticker=ticker)
    accelerator.free_memory()  # what optimizers hold is three times the student
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
    lesson: Lesson, teacher: nn.Module, num_classes: int, share: Share, accelerator: Accelerator
) -> TeacherCache | None:
    """What the teacher said of the lesson's views in earlier runs; None where nobody asked for that."""
    recipe, steps, images = lesson.recipe, num_steps(lesson), lesson.images
    if recipe.run.cache_teacher is None or steps is None or images is None:
        return None
    fields = to_dict(recipe)["data"]
    facts = {
        "teacher.sha256": sha256_of(teacher.state_dict()), "training images": images_digest(images),
        "--seed": recipe.run.seed, "--precision": recipe.run.precision, "data config": lesson.config,
        **{flag_of(name): fields[name] for name in _DECIDE_VIEWS},
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


def load_adapted(teacher: Teacher, config: dict[str, Any], comparison: Matching) -> nn.Module:
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
    with reporter.counting("evaluating", brief=True) as tell:
        return evaluator(student, teacher, tell)


def carry_out(
    learn: Callable[[], TrainLog],
    finish: Callable[[TrainLog, Path], Report],
    out: Path,
    recipe: Recipe,
    *,
    checkpoints: Checkpoints | None,
    accelerator: Accelerator,
    reporter: Reporter,
) -> Report:
    """Train, and write what came out; of a training that diverged its last good state, beside `out`.

    Args:
        learn: trains the student.
        finish: evaluates it and writes it to a path.
        out: that path.
        recipe: what was asked for, for trackers.
        checkpoints: of the training, discarded once all is written; None where none are kept.
        accelerator: knows the processes, which end together.
        reporter: told of the result.

    Raises:
        DivergedError: the training diverged; says where its last good state is.
    """
    with checkpoints.telling() if checkpoints else nullcontext():
        try:
            with tracking(accelerator, recipe, out):
                log = learn()
        except DivergedError as error:
            kept = out.with_name(f"{out.stem}.last-good{out.suffix}")
            finish(error.log, kept)
            raise DivergedError(f"{error} The last good state is in {kept}.", hint=error.hint) from error
        report = finish(log, out)
    tell_result(reporter, report, out)
    if checkpoints and accelerator.is_main_process:
        checkpoints.discard()
    part(accelerator)
    return report
