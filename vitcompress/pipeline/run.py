"""A checked request to `compress` or `finetune`.

prepare → Run → train → finish → Report
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vitcompress.data.calibration import Drawing, calibration_batches, draw_calibration
from vitcompress.data.sets import ImageSet
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.distill.facts import run_facts
from vitcompress.distill.log import TrainLog
from vitcompress.distill.matching import Matching
from vitcompress.distill.teacher import Teacher
from vitcompress.measure.accuracy import Evaluator
from vitcompress.plans.model import Plan
from vitcompress.pretrained.resolve import Source
from vitcompress.recipe import DEFAULT_STEPS, Recipe
from vitcompress.recipe.compose import to_dict
from vitcompress.report.model import Parent
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.precision import precision_of
from vitcompress.runtime.stopwatch import Stopwatch


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
        clock: where the time of the command goes.
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
    clock: Stopwatch = field(default_factory=Stopwatch)

    @property
    def num_steps(self) -> int | None:
        """Length of the training in steps; None where it is given in minutes."""
        recipe = self.recipe.distill
        if recipe.max_minutes is not None:
            return None
        if recipe.epochs is not None and self.train is not None:
            return max(1, round(recipe.epochs * len(self.train) / self.recipe.data.step_images))
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

    def unjudged(self, count: int) -> Iterator[Tensor]:
        """Yield batches of up to `count` images that are not in `judged`, on the device."""
        assert self.train is not None  # `prepare` made sure
        return self._batches(self.drawing.unjudged(self.train, count))

    def _images_at(self, positions: Sequence[int]) -> Iterator[Tensor]:
        assert self.train is not None  # `prepare` made sure
        return self._batches(self.drawing.chosen(self.train, positions))

    def _batches(self, images: ImageSet) -> Iterator[Tensor]:
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
