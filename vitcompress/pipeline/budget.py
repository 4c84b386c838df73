"""Divide the minutes of a command: a search gets a share, training what all else leaves."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from vitcompress.data.calibration import draw_images
from vitcompress.data.sets import ImageSet
from vitcompress.data.streams import StreamReader
from vitcompress.distill.log import QUARTERS
from vitcompress.measure.accuracy import Evaluator
from vitcompress.measure.baselines import BASELINES
from vitcompress.measure.latency import SPEED_SECONDS
from vitcompress.pipeline.run import Run
from vitcompress.pipeline.watch import measured_alone
from vitcompress.recipe import MAX_CALIBRATION_IMAGES
from vitcompress.runtime.processes import from_main

_PROBED_IMAGES = (32, 256)
_WRITING_SECONDS = 3.0  # plus the time of a slow disk for the bytes
_DISK_BYTES_PER_SECOND = 50e6
_MARGIN = 1.15
_STREAM_IMAGES = 50_000  # assumed length of a stream: ImageNet's validation set
_SEARCH_SHARE = 0.25  # of the minutes that are left when a search begins
_SEARCH_PASSES = 20  # forward passes of the images that a search takes at most: docs/scaling.md
_MIN_SEARCH_IMAGES = 64
_TIMED_IMAGES = 16
_WATCHED_SHARE = 0.03  # of a training's time, for measurements during it
_STEP_PASSES = 4  # a step takes the time of four forward passes of the student: its own, backward, the teacher's


@dataclass(frozen=True)
class Budget:
    """What a training may take.

    Attributes:
        seconds: its length; None where the recipe counts in steps.
        watched_images: number of images for each measurement during the training.
    """

    seconds: float | None
    watched_images: int


def search_images(run: Run, source: nn.Module) -> int:
    """Return how many images a search has the time to measure on; a power of two, 64 to 1,024.

    Args:
        run: a run that has minutes.
        source: the model to compress, in eval mode on the device.
    """
    count = images_in(_SEARCH_SHARE * seconds_left(run), run, source, passes=_SEARCH_PASSES)
    return 1 << int(math.log2(min(max(_MIN_SEARCH_IMAGES, count), MAX_CALIBRATION_IMAGES)))


def images_in(seconds: float, run: Run, model: nn.Module, *, passes: int) -> int:
    """Return how many images a model runs on in a time, the same number in all processes.

    Args:
        seconds: the time.
        run: the request.
        model: in eval mode on the device.
        passes: forward passes of each image.
    """
    images = torch.zeros(_TIMED_IMAGES, *run.config["input_size"], device=run.accelerator.device)
    with torch.inference_mode():
        model(images)  # warms up
        begun = time.perf_counter()
        float(model(images).flatten()[0])  # waits for a GPU
    per_image = (time.perf_counter() - begun) / _TIMED_IMAGES
    return from_main(int(seconds / (passes * per_image)), run.accelerator)


def training_budget(run: Run, student: nn.Module, reference: nn.Module | None) -> Budget:
    """Return what the training may take, the same in all processes.

    Args:
        run: the request.
        student: moved to the device; in eval mode afterwards.
        reference: the model that the student is evaluated with, likewise; None where there is none.
    """
    steps, measurements = run.num_steps, QUARTERS + 1
    if steps is not None:
        images = steps * run.recipe.data.step_images
        passes = measurements * (1 if measured_alone(run.val, student) else 2)
        return Budget(None, int(_WATCHED_SHARE * _STEP_PASSES * images / passes))
    for model in filter(None, (student, reference)):
        model.to(run.accelerator.device).eval()
    needed, per_image = _finishing_seconds(student, reference, run.evaluator, baselines=run.baselines)
    seconds = seconds_left(run, needed)
    watched = int(_WATCHED_SHARE * seconds / (measurements * per_image)) if per_image else 0
    return from_main(Budget(seconds, watched), run.accelerator)


def seconds_left(run: Run, needed: float = 0.0) -> float:
    """Return the seconds left for training; always a positive number, so that there is a step.

    Args:
        run: a run that has minutes.
        needed: seconds after the training.
    """
    minutes = run.recipe.distill.max_minutes
    assert minutes is not None
    return max(0.001, 60 * minutes - (time.time() - run.clock.started) - needed)


def _finishing_seconds(
    student: nn.Module, reference: nn.Module | None, evaluator: Evaluator, *, baselines: bool
) -> tuple[float, float]:
    """Estimate the seconds after the training from an evaluation of a few images.

    Returns:
        These seconds, and those to evaluate an image; 0 where there are no images.
    """
    num_bytes = sum(p.numel() * p.element_size() for p in student.parameters())
    rest = 2 * 2 * SPEED_SECONDS + _WRITING_SECONDS + num_bytes / _DISK_BYTES_PER_SECOND
    images = evaluator.images
    if images is None:
        return rest, 0.0

    def seconds(count: int) -> float:
        probe = replace(evaluator, images=draw_images(images, count, seed=0))
        start = time.perf_counter()
        probe(student, reference)
        return time.perf_counter() - start

    total, processes = _length(images), evaluator.accelerator.num_processes if evaluator.accelerator else 1
    few, more = (count * processes for count in _PROBED_IMAGES)
    seconds(few)  # warms up
    fixed = seconds(few)  # workers start
    per_image = max(0.0, seconds(more) - fixed) / (more - few) if total > few else fixed / few
    passes: float = 1 + (len(BASELINES) / 2 if baselines and reference is not None else 0)
    needed = _MARGIN * passes * (fixed + per_image * max(0, total - few))
    return rest + needed, per_image


def _length(images: ImageSet) -> int:
    if isinstance(images.reader, StreamReader):
        return images.reader.limit or _STREAM_IMAGES
    return len(images)
