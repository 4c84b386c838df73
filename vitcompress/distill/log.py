"""Counters and curves of a training, as the report shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import ConfigDict, Field

from vitcompress.plans.bounds import MAX_ENTRIES, Amount, Count, Number, Text

MAX_POINTS = 200  # of the loss curve
QUARTERS = 4  # of a training; it is measured before the first, and after each
_Point = Annotated[dict[Text, Number], Field(max_length=32)]


@dataclass(frozen=True)
class TrainLog:
    """Counters and curves of a training.

    Attributes:
        steps: number of optimizer steps.
        images: number of views, each counted every time it is seen.
        skipped_images: number of unreadable images, counted every time they are met.
        seconds: duration of the loop, with the measurements of the accuracy curve; without loading
            and evaluation.
        images_per_second: mean over the whole loop, without these measurements.
        loss_curve: at most 200 points, each `{step, lr, loss, <loss name>…}` with means since the
            previous point.
        accuracy_curve: the student before, during and after the training on a few validation
            images, each point `{step, images, <measure>}`, with the measure that the report
            compares by; empty where nothing was measured.
        teacher: name of the teacher; None without one.
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
    accuracy_curve: Annotated[tuple[_Point, ...], Field(max_length=QUARTERS + 1)] = ()
    teacher: Text | None = None
    losses: Annotated[dict[Text, Number], Field(max_length=MAX_ENTRIES)] = field(default_factory=dict)
    precision: Text | None = None
