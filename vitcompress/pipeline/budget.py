"""How long may the training take, where the whole command's length is given?  What evaluation and writing leave."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from accelerate import Accelerator
from torch import nn

from vitcompress.data import ImageSet, StreamReader
from vitcompress.measure.accuracy import Evaluator
from vitcompress.measure.baselines import BASELINES
from vitcompress.measure.latency import SPEED_SECONDS
from vitcompress.runtime.processes import from_main

_PROBED_IMAGES = (32, 256)
_WRITING_SECONDS = 3.0  # plus what a slow disk takes for the bytes
_DISK_BYTES_PER_SECOND = 50e6
_MARGIN = 1.15
_OF_A_STREAM = 50_000  # images, where nobody knows: as many as ImageNet has to validate on


def seconds_to_train(minutes: float, started: float, finishing: Callable[[], float], accelerator: Accelerator) -> float:
    """Seconds that are left for the training; some, in any case, so that there is a step.

    Args:
        minutes: of the whole command.
        started: when the command did, in seconds since 1970.
        finishing: seconds that all after the training will take.
        accelerator: the main process's clock counts.
    """
    needed = finishing()
    return from_main(max(0.001, 60 * minutes - (time.time() - started) - needed), accelerator)


def training_seconds(
    minutes: float | None,
    started: float,
    student: nn.Module,
    teacher: nn.Module | None,
    evaluator: Evaluator,
    *,
    baselines: bool,
) -> float | None:
    """How long to train; None where the recipe counts in steps.

    Args:
        minutes: of the whole command; None where it has no limit.
        started: when the command did, in seconds since 1970.
        student: moved to the accelerator's device, in eval mode from now on.
        teacher: the same; None where there is none.
        evaluator: what they are evaluated with afterwards.
        baselines: the teacher in fewer bits is evaluated too.
    """
    if minutes is None:
        return None
    assert evaluator.accelerator is not None
    for model in filter(None, (student, teacher)):
        model.to(evaluator.accelerator.device).eval()
    estimate = partial(finishing_seconds, student, teacher, evaluator, baselines=baselines)
    return seconds_to_train(minutes, started, estimate, evaluator.accelerator)


def finishing_seconds(student: nn.Module, teacher: nn.Module | None, evaluator: Evaluator, *, baselines: bool) -> float:
    """Estimate what evaluation, latencies, baselines and writing will take, from an evaluation of a few images.

    Args:
        student: in eval mode, on the accelerator's device.
        teacher: the same; None where there is none.
        evaluator: what they are evaluated with.
        baselines: the teacher in fewer bits is evaluated too.
    """
    num_bytes = sum(p.numel() * p.element_size() for p in student.parameters())
    rest = 2 * 2 * SPEED_SECONDS + _WRITING_SECONDS + num_bytes / _DISK_BYTES_PER_SECOND
    images = evaluator.images
    if images is None:
        return rest

    def seconds(count: int) -> float:
        few = replace(evaluator, images=_first(images, count))
        start = time.perf_counter()
        few(student, teacher)
        return time.perf_counter() - start

    assert evaluator.accelerator is not None
    total = _length(images)
    few, more = (each * evaluator.accelerator.num_processes for each in _PROBED_IMAGES)
    fixed = seconds(few)  # workers start, and the first pass warms up
    slope = max(0.0, seconds(more) - fixed) / (more - few) if total > few else 0.0
    passes: float = 1 + (len(BASELINES) / 2 if baselines and teacher is not None else 0)
    needed: float = _MARGIN * passes * (fixed + slope * max(0, total - few))
    return rest + needed


def _first(images: ImageSet, count: int) -> ImageSet:
    if isinstance(images.reader, StreamReader):
        return images.streamed(replace(images.reader, limit=count))
    return images.subset(range(min(count, len(images))), images.name)


def _length(images: ImageSet) -> int:
    if isinstance(images.reader, StreamReader):
        return images.reader.limit or _OF_A_STREAM
    return len(images)
