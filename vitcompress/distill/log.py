"""What training did: counters and the loss curve, as the report has them."""

from __future__ import annotations

from dataclasses import field

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

MOST_POINTS = 200  # of the loss curve in the report


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
