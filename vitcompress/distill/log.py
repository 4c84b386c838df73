"""Counters and loss curve of a training, as the report shows them."""

from __future__ import annotations

from dataclasses import field

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

MOST_POINTS = 200  # of the loss curve


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainLog:
    """Counters and loss curve of a training.

    Attributes:
        steps: number of optimizer steps.
        images: number of views, each counted every time it is seen.
        skipped_images: number of unreadable images, counted every time they are met.
        seconds: duration of the loop, without loading and evaluation.
        images_per_second: mean over the whole loop.
        loss_curve: at most 200 points, each `{step, lr, loss, <loss name>…}` with means since the
            previous point.
        teacher: name of the teacher; None without one.
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
