"""State of one training run: its length, counters, the loss curve, and the last good weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.distill.log import MOST_POINTS, TrainLog
from vitcompress.errors import TrainingError
from vitcompress.recipe import DistillRecipe

_SNAPSHOT_STEPS = 50


@dataclass(frozen=True)
class Agreed:
    """What all processes know of a step.

    Attributes:
        losses: weighted, by name, and their sum as `loss`; means over the step's images.
        norm: of the gradient.
        done: share of the training that is over, 0–1.
        due: the state is to be kept.
        stop: SIGTERM came to one of them, or Ctrl-C.
        images: of the step.
        skipped: unreadable ones that others stand in for.
    """

    losses: dict[str, float]
    norm: float
    done: float
    due: bool
    stop: bool
    images: int
    skipped: int


class DivergedError(TrainingError):
    """The loss became infinite or undefined; the student holds its last good state.

    Attributes:
        log: the training up to there.
    """

    log: TrainLog


class Run:
    """State of one training run: its length, counters, the loss curve, and the last good weights.

    Args:
        recipe: for messages.
        student: gets the last good weights where the training diverges.
        num_steps: length in steps; None where `seconds` is given.
        seconds: length in time.
        kept: the model whose weights are kept in the end, of the student's structure: itself or its running mean.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        student: nn.Module,
        num_steps: int | None,
        seconds: float | None,
        *,
        kept: nn.Module,
    ) -> None:
        self.recipe, self.student, self.num_steps, self.limit = recipe, student, num_steps, seconds
        self.kept = kept
        self.start, self.before = time.perf_counter(), 0.0
        self.waited = 0.0
        self.steps = self.images = self.skipped = 0
        self.sums: dict[str, float] = {}
        self.since, self.every = 0, 1
        self.curve: list[dict[str, float]] = []
        self.good = _copy(kept)

    def done(self, *, ahead: int = 0) -> float:
        """Share of the training that is over, 0–1, `ahead` steps from now, or by this process's clock."""
        if self.num_steps is not None:
            return (self.steps + ahead) / self.num_steps
        return min(1.0, self.seconds() / self.limit) if self.limit else 1.0

    def seconds(self) -> float:
        """Spent training, before an interruption too."""
        return self.before + time.perf_counter() - self.start

    def images_per_second(self) -> float:
        """Since the start."""
        return self.images / self.seconds()

    def waiting(self) -> float:
        """Share of the time since the start, or since the run was resumed, that went by waiting for images."""
        return self.waited / max(time.perf_counter() - self.start, 1e-9)

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Count the time of the block as waiting for images."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def record(self, step: Agreed, *, lr: float) -> None:
        """Count a step whose gradients are about to be applied.

        Args:
            step: what it came to.
            lr: of AdamW.

        Raises:
            DivergedError: the loss or the gradient is not finite.
        """
        self.check_finite(math.isfinite(step.losses["loss"]) and math.isfinite(step.norm))
        if self.steps % _SNAPSHOT_STEPS == 0:
            self.good = _copy(self.kept)
        self.steps += 1
        self.images += step.images
        self.skipped += step.skipped
        for name, value in step.losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.since += 1
        if self.since == self.every:
            self._point(lr)

    def _point(self, lr: float) -> None:
        self.curve.append({"step": self.steps, "lr": lr, **{k: v / self.since for k, v in self.sums.items()}})
        self.sums, self.since = {}, 0
        if len(self.curve) == MOST_POINTS:  # every second point goes, and new ones come half as often
            self.curve, self.every = self.curve[1::2], 2 * self.every

    def check_finite(self, finite: bool) -> None:
        """Restore the last good weights and stop, unless what was found is finite."""
        if finite:
            return
        with torch.no_grad():
            for p, value in zip(self.student.parameters(), self.good, strict=True):
                p.copy_(value)
        self.student.eval()
        error = DivergedError(
            f"The training is not finite after step {self.steps} (--lr {self.recipe.peak_lr:g}).",
            hint=f"Try --lr {self.recipe.peak_lr / 10:g}.",
        )
        error.log = self.log()
        raise error

    def counters(self) -> dict[str, Any]:
        """All that a resumed run goes on from but weights, as JSON has it."""
        names = ("limit", "steps", "images", "skipped", "sums", "since", "every", "curve")
        return {"seconds": self.seconds(), **{name: getattr(self, name) for name in names}}

    def go_on(self, counters: Mapping[str, Any], good: Iterable[Tensor]) -> None:
        """Go on from where another run was, in place."""
        self.start, self.before = time.perf_counter(), float(counters["seconds"])
        for name, value in counters.items():
            if name != "seconds":
                setattr(self, name, value)
        self.good = list(good)

    def log(self) -> TrainLog:
        """What happened so far."""
        return TrainLog(
            steps=self.steps,
            images=self.images,
            skipped_images=self.skipped,
            seconds=round(self.seconds(), 3),
            images_per_second=round(self.images_per_second(), 1),
            loss_curve=tuple({name: round(value, 6) for name, value in point.items()} for point in self.curve),
        )


def _copy(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
