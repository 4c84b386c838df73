"""A checked request and its training, for `compress` and `finetune`.

prepare → Run → train → finish → Report
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vitcompress.artifact.digest import sha256_of
from vitcompress.data.augmentation import Mixing
from vitcompress.data.calibration import Drawing, calibration_batches, draw_calibration
from vitcompress.data.loaders import Batch, ProcessShare, process_share, training_loader
from vitcompress.data.sets import ImageSet
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.distill.facts import images_digest, run_facts
from vitcompress.distill.log import TrainLog
from vitcompress.distill.loop import distill
from vitcompress.distill.matching import Matching
from vitcompress.distill.settings import TrainSettings
from vitcompress.distill.teacher import Teacher, adapt_inputs
from vitcompress.distill.teacher_cache import TeacherCache
from vitcompress.families.outputs import deviation_of, outputs_of, outputs_on
from vitcompress.families.registry import family_named
from vitcompress.measure.accuracy import Evaluator
from vitcompress.plans.model import Plan
from vitcompress.pretrained.resolve import Source
from vitcompress.quantize.layers import quantization_aware_training
from vitcompress.recipe import DEFAULT_STEPS, Recipe, flag_of
from vitcompress.recipe.compose import to_dict
from vitcompress.report.model import Parent
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.processes import precision_of

DEVIATION_IMAGES = 128  # calibration images on which the outputs' deviation is measured
_VIEW_FIELDS = ("crop_min", "hflip", "auto_augment", "erase", "repeats", "mixup", "cutmix")


@dataclass(frozen=True)
class Run:
    """A checked request, with everything that it names.

    Attributes:
        recipe: the recipe, with default losses filled in.
        out: path of the artifact to write.
        command: the command as typed.
        source: the model that is compressed; for `finetune`, the artifact's source with the new
            head and image size.
        plan: the student's plan.
        config: timm's data config of the student.
        train: training images; None where nothing is trained.
        val: images to evaluate on; None where there are none.
        teacher: a teacher other than the source; None for the source, or for no teacher.
        teacher_name: the teacher's name in the report; None where no loss needs a teacher.
        matching: the losses, and where student and teacher are read.
        accelerator: device and processes.
        reporter: shows the progress.
        checkpoints: where the state of the training is kept; None where it is not.
        classes: class names of the student; empty where they are not known.
        notes: notes for the report that are known before training.
        lineage: the artifacts that the student descends from, oldest first.
        drawn: the calibration images, drawn with the model's predictions; None where these are not
            needed.
    """

    recipe: Recipe
    out: Path
    command: str
    source: Source
    plan: Plan
    config: dict[str, Any]
    train: ImageSet | None
    val: ImageSet | None
    teacher: Teacher | None
    teacher_name: str | None
    matching: Matching
    accelerator: Accelerator
    reporter: Reporter
    checkpoints: Checkpoints | None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lineage: tuple[Parent, ...] = ()
    drawn: Drawing | None = None

    @property
    def num_steps(self) -> int | None:
        """Length of the training in steps; None where it is given in minutes."""
        recipe = self.recipe.distill
        if recipe.max_minutes is not None:
            return None
        if recipe.epochs is not None and self.train is not None:
            return max(1, round(recipe.epochs * len(self.train) / self.recipe.data.batch_size))
        return DEFAULT_STEPS if recipe.steps is None else recipe.steps

    @property
    def num_images(self) -> float:
        """Number of training images: infinite for a stream, 0 for crops of a few photographs."""
        if self.train is None or (self.train.endless and not self.train.streams):
            return 0
        return math.inf if self.train.streams else len(self.train)

    @property
    def baselines(self) -> bool:
        """Whether the teacher is also measured in fewer bits; not beside an artifact's student."""
        return self.recipe.store.baselines and not self.lineage

    @property
    def evaluator(self) -> Evaluator:
        """Evaluates models on the validation images."""
        return Evaluator(self.val, self.config, self.recipe.data, self.accelerator, self.recipe.distill.accumulate)

    @cached_property
    def drawing(self) -> Drawing:
        """Which training images starts are fitted to, and which ones they are judged on."""
        assert self.train is not None  # `prepare` made sure
        return self.drawn or draw_calibration(
            self.train, self.recipe.start.calibration_images, seed=self.recipe.run.seed
        )

    def calibration(self) -> Iterator[Tensor]:
        """Yield batches of the images that starts are fitted to, on the device."""
        return self._images_at(self.drawing.fitted)

    def judged(self) -> Iterator[Tensor]:
        """Yield batches of images that nothing was fitted to, on the device.

        They are up to 128 training images other than those of `calibration`, but for a single one.
        """
        return self._images_at(self.drawing.judged)

    def _images_at(self, positions: Sequence[int]) -> Iterator[Tensor]:
        assert self.train is not None  # `prepare` made sure
        images = self.drawing.chosen(self.train, positions)
        for batch in calibration_batches(images, self.config, self.recipe.data):
            yield batch.to(self.accelerator.device)

    def facts(self, **digests: str) -> dict[str, Any]:
        """Return what must be the same where an interrupted run is resumed.

        Args:
            digests: SHA-256 of the models, by name.
        """
        return run_facts(
            to_dict(self.recipe), self.train, **digests, precision=precision_of(self.recipe.run),
            num_processes=self.accelerator.num_processes, torch=torch.__version__,
        )  # fmt: skip

    def labelled(self, log: TrainLog) -> TrainLog:
        """Return the log with the teacher, the losses and the precision of the training."""
        if not log.steps:
            return log
        precision = precision_of(self.recipe.run)
        return replace(log, teacher=self.teacher_name, losses=dict(self.matching.losses), precision=precision)


def load_adapted(
    teacher: Teacher, config: dict[str, Any], matching: Matching, tell: Callable[[str], object]
) -> nn.Module:
    """Load a teacher that accepts the student's views.

    Args:
        teacher: the teacher to load.
        config: timm's data config of the views.
        matching: says whether views must be resized.
        tell: receives sentences on what was done with its weights.
    """
    model = teacher.load(tell)
    adapt_inputs(model, teacher.config, config, matching.image_size)
    return model


def train(
    run: Run,
    student: nn.Module,
    teacher: nn.Module | None,
    seconds: float | None,
    *,
    follow: Callable[[float], None] = lambda done: None,
    cached_as: nn.Module | None = None,
) -> TrainLog:
    """Train the student, in place.

    Args:
        run: the request.
        student: the student, on any device.
        teacher: takes the student's views; None where no loss needs it.
        seconds: length in time; None where it is given in steps.
        follow: called before each step with the share of the training that is over.
        cached_as: the model whose weights name the teacher's cache; None for the teacher itself.

    Returns:
        The training log; empty where nothing is trained.
    """
    steps, images, recipe = run.num_steps, run.train, run.recipe
    if steps == 0 or images is None:
        return TrainLog()
    seed, share = recipe.run.seed, process_share(run.accelerator, accumulate=recipe.distill.accumulate)

    def batches(start: int) -> Iterable[Batch]:
        return training_loader(images, run.config, recipe.data, seed=seed, num_steps=steps, start=start, share=share)

    num_classes: Any = student.num_classes
    mixing = Mixing(
        mixup=recipe.data.mixup,
        cutmix=recipe.data.cutmix,
        num_classes=num_classes if "labels" in run.matching.losses else None,
        smoothing=recipe.distill.label_smoothing,
        seed=seed,
    )
    cache = None if teacher is None else _teacher_cache(run, cached_as or teacher, num_classes, share)
    with (
        quantization_aware_training(student, recipe.store.kind, recipe.store.qat_fraction) as quantize,
        run.reporter.training(forecast=recipe.distill.max_minutes is None) as ticker,
    ):

        def before_step(done: float) -> None:
            follow(done)
            quantize(done)

        settings = TrainSettings(
            recipe.distill,
            run.matching,
            blocks=family_named(run.plan.family).block_names(student),
            matrices=run.plan.matrices,
            input_size=run.config["input_size"],
            num_steps=steps,
            seconds=seconds,
            seed=seed,
            mixing=mixing,
            skip_bad_images=recipe.data.skip_bad_images,
            checkpoints=run.checkpoints,
            teacher_cache=cache,
            deviation=_deviation(run, student, teacher),
            compiled=recipe.run.compile,
            before_step=before_step,
        )
        log = distill(student, teacher, batches, settings, accelerator=run.accelerator, ticker=ticker)
    run.accelerator.free_memory()  # the optimizers hold three times the student
    return log


def _deviation(run: Run, student: nn.Module, teacher: nn.Module | None) -> Tensor | None:
    """Return the deviation of the teacher's outputs over images, where a loss uses it."""
    kind = outputs_of(student)
    if teacher is None or not kind.uses_deviation or kind.loss not in run.matching.losses:
        return None
    teacher.to(run.accelerator.device).eval()
    return deviation_of(outputs_on(teacher, first_images(run.calibration(), DEVIATION_IMAGES)))


def first_images(batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Yield the first `count` images of some batches, and ask for no batch beyond them."""
    for batch in batches:
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return


def _teacher_cache(run: Run, teacher: nn.Module, num_classes: int, share: ProcessShare) -> TeacherCache | None:
    """Return the cache of the teacher's outputs; None where the recipe has none."""
    recipe, steps, images = run.recipe, run.num_steps, run.train
    if recipe.run.cache_teacher is None or steps is None or images is None:
        return None
    fields = to_dict(recipe)["data"]
    facts = {
        "teacher.sha256": sha256_of(teacher.state_dict()), "training images": images_digest(images),
        "--seed": recipe.run.seed, "--precision": precision_of(recipe.run), "data config": run.config,
        **{flag_of(name): fields[name] for name in _VIEW_FIELDS},
    }  # fmt: skip
    if recipe.distill.small_first:  # which views are small depends on both
        facts |= {"--small-first": recipe.distill.small_first, "--steps": steps}
    with run.accelerator.local_main_process_first():
        return TeacherCache(
            recipe.run.cache_teacher, facts, num_steps=steps, batch_size=recipe.data.batch_size,
            num_classes=num_classes, share=share,
        )  # fmt: skip
