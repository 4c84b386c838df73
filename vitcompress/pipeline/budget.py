"""Divide the minutes of a command: training gets what evaluation and writing leave."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import nn

from vitcompress.data.sets import ImageSet
from vitcompress.data.streams import StreamReader
from vitcompress.measure.accuracy import Evaluator
from vitcompress.measure.baselines import BASELINES
from vitcompress.measure.latency import SPEED_SECONDS
from vitcompress.pipeline.run import Run
from vitcompress.runtime.processes import from_main

_PROBED_IMAGES = (32, 256)
_WRITING_SECONDS = 3.0  # plus the time of a slow disk for the bytes
_DISK_BYTES_PER_SECOND = 50e6
_MARGIN = 1.15
_STREAM_IMAGES = 50_000  # assumed length of a stream: ImageNet's validation set


def training_seconds(run: Run, started: float, student: nn.Module, teacher: nn.Module | None) -> float | None:
    """Return the length of the training in seconds; None where the recipe counts in steps.

    Args:
        run: the request.
        started: when the command started, in seconds since 1970.
        student: moved to the device; in eval mode afterwards.
        teacher: the model that the student is evaluated with, likewise; None where there is none.
    """
    minutes = run.recipe.distill.max_minutes
    if minutes is None:
        return None
    for model in filter(None, (student, teacher)):
        model.to(run.accelerator.device).eval()
    needed = _finishing_seconds(student, teacher, run.evaluator, baselines=run.baselines)
    return from_main(seconds_left(minutes, started, needed), run.accelerator)


def seconds_left(minutes: float, started: float, needed: float) -> float:
    """Return the seconds left for training; always a positive number, so that there is a step.

    Args:
        minutes: length of the whole command.
        started: when the command started, in seconds since 1970.
        needed: seconds after the training.
    """
    return max(0.001, 60 * minutes - (time.time() - started) - needed)


def _finishing_seconds(
    student: nn.Module, teacher: nn.Module | None, evaluator: Evaluator, *, baselines: bool
) -> float:  # fmt: skip
    """Estimate the seconds after the training from an evaluation of a few images."""
    num_bytes = sum(p.numel() * p.element_size() for p in student.parameters())
    rest = 2 * 2 * SPEED_SECONDS + _WRITING_SECONDS + num_bytes / _DISK_BYTES_PER_SECOND
    images = evaluator.images
    if images is None:
        return rest

    def seconds(count: int) -> float:
        probe = replace(evaluator, images=_first(images, count))
        start = time.perf_counter()
        probe(student, teacher)
        return time.perf_counter() - start

    total, processes = _length(images), evaluator.accelerator.num_processes if evaluator.accelerator else 1
    few, more = (count * processes for count in _PROBED_IMAGES)
    fixed = seconds(few)  # workers start, and the first pass warms up
    slope = max(0.0, seconds(more) - fixed) / (more - few) if total > few else 0.0
    passes: float = 1 + (len(BASELINES) / 2 if baselines and teacher is not None else 0)
    needed: float = _MARGIN * passes * (fixed + slope * max(0, total - few))
    return rest + needed


def _first(images: ImageSet, count: int) -> ImageSet:
    if isinstance(images.reader, StreamReader):
        return replace(images, reader=replace(images.reader, limit=count))
    return images.subset(range(min(count, len(images))), images.name)


def _length(images: ImageSet) -> int:
    if isinstance(images.reader, StreamReader):
        return images.reader.limit or _STREAM_IMAGES
    return len(images)
