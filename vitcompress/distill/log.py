"""What training did: counters and the loss curve, as the report has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import ConfigDict, Field

from vitcompress.plans.bounds import MAX_ENTRIES, Amount, Count, Number, Text

MOST_POINTS = 200  # of the loss curve in the report
_Point = Annotated[dict[Text, Number], Field(max_length=32)]


@dataclass(frozen=True)
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
        precision: precision of the training: fp32, tf32 or bf16; None in reports of version 0.1.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: Count = 0
    images: Count = 0
    skipped_images: Count = 0
    seconds: Amount = 0.0
    images_per_second: Amount = 0.0
    loss_curve: Annotated[tuple[_Point, ...], Field(max_length=400)] = ()
    teacher: Text | None = None
    losses: Annotated[dict[Text, Number], Field(max_length=MAX_ENTRIES)] = field(default_factory=dict)
    precision: Text | None = None
