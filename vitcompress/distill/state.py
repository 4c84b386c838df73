"""State of a training: length, counters, curves and the last good weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.distill.log import MAX_POINTS, TrainLog
from vitcompress.errors import TrainingError

_SNAPSHOT_STEPS = 50
# their names on disk, too
_COUNTERS = (
    "limit", "steps", "images", "skipped", "sums", "since", "every", "curve", "accuracy", "quarters", "measured",
)  # fmt: skip


@dataclass(frozen=True)
class StepResult:
    """What all processes know about a step.

    Attributes:
        losses: mean of each weighted loss over the step's images, by name, and of their sum as
            `loss`.
        norm: norm of the gradient.
        done: share of the training that is over, 0–1.
        due: whether it is time to keep the state.
        stop: whether SIGTERM or Ctrl-C came to one of the processes.
        images: number of images of the step.
        skipped: number of unreadable images, replaced by others.
    """

    losses: dict[str, float]
    norm: float
    done: float
    due: bool
    stop: bool
    images: int
    skipped: int


class DivergedError(TrainingError):
    """A loss or a weight is not finite; the student has its last good weights.

    Attributes:
        log: the training until then.
    """

    log: TrainLog


class TrainState:
    """State of a training: length, counters, curves and the last good weights.

    Args:
        student: gets the last good weights if the training diverges.
        kept: the model whose weights are the result: the student or its running mean.
        lr: peak learning rate, for error messages.
        num_steps: length in steps; None if `seconds` limits the training.
        seconds: length in seconds; None if `num_steps` limits the training.
    """

    def __init__(
        self, student: nn.Module, kept: nn.Module, *, lr: float, num_steps: int | None, seconds: float | None
    ) -> None:
        self.student, self.kept = student, kept
        self.lr, self.num_steps, self.limit = lr, num_steps, seconds
        self.start, self.seconds_before = time.perf_counter(), 0.0  # of this process; of interrupted ones
        self.waited = 0.0  # seconds
        self.steps = self.images = self.skipped = 0
        self.sums: dict[str, float] = {}  # of the losses since the last point of the curve
        self.since, self.every = 0, 1  # steps since the last point, and steps per point
        self.curve: list[dict[str, float]] = []
        self.accuracy: list[dict[str, float]] = []  # points of the accuracy curve
        self.quarters = 0  # of the training, before which its accuracy was measured
        self.measured = 0.0  # seconds that this took
        self.good = _copy_parameters(kept)

    def done(self, *, ahead: int = 0) -> float:
        """Return the share of the training that is over, 0–1, now or `ahead` steps later."""
        if self.num_steps is not None:
            return (self.steps + ahead) / self.num_steps
        return min(1.0, self.seconds() / self.limit) if self.limit else 1.0

    def seconds(self) -> float:
        """Return the seconds spent training, including those before an interruption."""
        return self.seconds_before + time.perf_counter() - self.start

    def images_per_second(self) -> float:
        """Return the mean rate since the start, while it trained."""
        return self.images / max(self.seconds() - self.measured, 1e-9)

    def waiting(self) -> float:
        """Return the share of time spent waiting for images, since this process started."""
        return self.waited / max(time.perf_counter() - self.start, 1e-9)

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Count the time inside the context as waiting for images."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the time inside the context as measuring the accuracy."""
        start = time.perf_counter()
        yield
        self.measured += time.perf_counter() - start

    def record(self, step: StepResult, *, lr: float) -> None:
        """Count a step, in place, before its gradients are applied.

        Args:
            step: its losses and counts.
            lr: learning rate of AdamW.

        Raises:
            DivergedError: the loss or the gradient is not finite.
        """
        self.check_finite(math.isfinite(step.losses["loss"]) and math.isfinite(step.norm))
        if self.steps % _SNAPSHOT_STEPS == 0:
            self.good = _copy_parameters(self.kept)
        self.steps += 1
        self.images += step.images
        self.skipped += step.skipped
        for name, value in step.losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.since += 1
        if self.since == self.every:
            self._add_point(lr)

    def _add_point(self, lr: float) -> None:
        self.curve.append({"step": self.steps, "lr": lr, **{k: v / self.since for k, v in self.sums.items()}})
        self.sums, self.since = {}, 0
        if len(self.curve) == MAX_POINTS:  # drop every second point, and add new ones half as often
            self.curve, self.every = self.curve[1::2], 2 * self.every

    def check_finite(self, finite: bool) -> None:
        """Restore the last good weights, in place, and raise DivergedError, unless `finite`."""
        if finite:
            return
        set_parameters(self.student, self.good)
        self.student.eval()
        error = DivergedError(
            f"The training is not finite after step {self.steps} (--lr {self.lr:g}).",
            hint=f"Try --lr {self.lr / 10:g}.",
        )
        error.log = self.log()
        raise error

    def counters(self) -> dict[str, Any]:
        """Return everything but weights that a resumed run needs, as JSON values."""
        return {"seconds": self.seconds(), **{name: getattr(self, name) for name in _COUNTERS}}

    def resume(self, counters: Mapping[str, Any], good: Iterable[Tensor]) -> None:
        """Continue from the counters and last good weights of an interrupted run, in place."""
        self.start, self.seconds_before = time.perf_counter(), float(counters["seconds"])
        for name, value in counters.items():
            if name != "seconds":
                setattr(self, name, value)
        self.good = list(good)

    def log(self) -> TrainLog:
        """Return the log of the training so far."""
        return TrainLog(
            steps=self.steps,
            images=self.images,
            skipped_images=self.skipped,
            seconds=round(self.seconds(), 3),
            images_per_second=round(self.images_per_second(), 1),
            loss_curve=tuple({name: round(value, 6) for name, value in point.items()} for point in self.curve),
            accuracy_curve=tuple(self.accuracy),
        )


def set_parameters(model: nn.Module, values: Iterable[Tensor]) -> None:
    """Set the parameters of `model` to `values`, in place."""
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)


def _copy_parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
