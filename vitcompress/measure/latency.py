"""Measure the latency of student and teacher.

torch.utils.benchmark was tried and dropped: importing it needs setuptools, which torch 2.9 does not
install on Python 3.11, and prints a notice where CUDA is installed without a GPU.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from vitcompress.measure.results import Speed

SPEED_SECONDS = 3.0  # of timing, per batch size
_MIN_PAIRS, _MAX_PAIRS = 3, 49


def measure_speed(
    student: nn.Module,
    teacher: nn.Module,
    input_size: tuple[int, int, int],
    *,
    device: torch.device,
    budget_seconds: float = SPEED_SECONDS,
) -> Speed:
    """Measure the median time of one forward pass at batch 1 and 32.

    Args:
        student: student in eval mode, on `device`.
        teacher: teacher in eval mode, on `device`.
        input_size: (channels, height, width).
        device: device of the models.
        budget_seconds: time to spend per batch size; at least three pairs of passes are timed.
    """
    student_ms, teacher_ms = {}, {}
    for batch_size in (1, 32):
        images = torch.zeros(batch_size, *input_size, device=device)
        end = time.perf_counter() + budget_seconds
        pairs: list[tuple[float, float]] = []  # alternating, so that a machine that slows down slows both
        while len(pairs) <= _MIN_PAIRS or (time.perf_counter() < end and len(pairs) <= _MAX_PAIRS):
            pairs.append((_forward_seconds(student, images), _forward_seconds(teacher, images)))
        medians = (round(1000 * statistics.median(times), 3) for times in zip(*pairs[1:], strict=True))
        student_ms[str(batch_size)], teacher_ms[str(batch_size)] = medians  # without the first pair, which warms up
    return Speed(teacher_ms, student_ms, torch.get_num_threads(), _device_name(device))


@torch.inference_mode()
def _forward_seconds(model: nn.Module, images: Tensor) -> float:
    _wait_for(images.device)
    start = time.perf_counter()
    model(images)
    _wait_for(images.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
