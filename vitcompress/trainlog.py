"""What did training do?  Counters, the loss curve, and the last good weights to fall back on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from vitcompress.errors import TrainingError
from vitcompress.recipe import DistillRecipe

_POINTS = 200  # of the loss curve in the report
_SNAPSHOT_STEPS = 50


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainLog:
    """What training did.

    Attributes:
        steps: optimizer steps taken.
        images: views seen, counted each time.
        skipped_images: unreadable ones met, counted each time.
        seconds: of the loop, without loading and evaluation.
        images_per_second: over the whole loop.
        loss_curve: at most 200 points, each `{step, lr, loss, <loss name>…}`; a point is a mean since the one before.
        teacher: the name of the model that was learned from; None where nothing was learned.
        losses: weight of each loss.
    """

    steps: int = 0
    images: int = 0
    skipped_images: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    loss_curve: tuple[dict[str, float], ...] = field(default_factory=tuple)
    teacher: str | None = None
    losses: dict[str, float] = field(default_factory=dict)


class DivergedError(TrainingError):
    """The loss became infinite or undefined; the student holds its last good state.

    Attributes:
        log: the training up to there.
    """

    log: TrainLog


class Run:
    """State of one training run: counters, the loss curve, and the last good weights.

    Args:
        recipe: for messages.
        student: gets the last good weights where the training diverges.
        kept: the model whose weights are kept in the end, of the student's structure: itself or its running mean.
    """

    def __init__(self, recipe: DistillRecipe, student: nn.Module, *, kept: nn.Module) -> None:
        self.recipe, self.student, self.kept = recipe, student, kept
        self.steps = self.images = self.skipped = 0
        self.seconds = 0.0
        self.sums: dict[str, float] = {}
        self.since = 0
        self.every = 1
        self.curve: list[dict[str, float]] = []
        self.good = _copy(kept)

    def record(
        self, losses: Mapping[str, Tensor], total: Tensor, norm: Tensor, *, lr: float, images: int, seconds: float
    ) -> None:
        """Count a step whose gradients are about to be applied.

        Raises:
            DivergedError: the loss or the gradient is not finite.
        """
        values = {"loss": float(total.detach()), **{name: float(value.detach()) for name, value in losses.items()}}
        if not math.isfinite(values["loss"]) or not math.isfinite(float(norm)):
            self._diverged()
        if self.steps % _SNAPSHOT_STEPS == 0:
            self.good = _copy(self.kept)
        self.steps += 1
        self.images += images
        self.seconds = seconds
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.since += 1
        if self.since == self.every:
            self._point(lr)

    def _point(self, lr: float) -> None:
        self.curve.append({"step": self.steps, "lr": lr, **{k: v / self.since for k, v in self.sums.items()}})
        self.sums, self.since = {}, 0
        if len(self.curve) == _POINTS:  # every second point goes, and new ones come half as often
            self.curve, self.every = self.curve[1::2], 2 * self.every

    def _diverged(self) -> None:
        with torch.no_grad():
            for p, value in zip(self.student.parameters(), self.good, strict=True):
                p.copy_(value)
        self.student.eval()
        error = DivergedError(
            f"The loss is not finite at step {self.steps + 1} (--lr {self.recipe.lr:g}).",
            hint=f"Try --lr {self.recipe.lr / 10:g}.",
        )
        error.log = self.log()
        raise error

    def log(self) -> TrainLog:
        """What happened so far."""
        speed = self.images / self.seconds if self.seconds else 0.0
        return TrainLog(
            steps=self.steps,
            images=self.images,
            skipped_images=self.skipped,
            seconds=round(self.seconds, 3),
            images_per_second=round(speed, 1),
            loss_curve=tuple({name: round(value, 6) for name, value in point.items()} for point in self.curve),
        )


def _copy(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
