"""How fast is the student, next to its teacher?"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.measure.results import Speed

SPEED_SECONDS = 3.0  # to time latencies in, per batch size


def measure_speed(
    student: nn.Module,
    teacher: nn.Module,
    input_size: tuple[int, int, int],
    *,
    device: torch.device,
    budget_seconds: float = SPEED_SECONDS,
) -> Speed:
    """Time one forward pass of each model, alternating, at batch 1 and 32.

    Args:
        student: in eval mode, on `device`.
        teacher: the same.
        input_size: (channels, height, width).
        device: where the models are.
        budget_seconds: time to spend per batch size; at least three pairs are timed.
    """
    times: dict[str, dict[str, float]] = {"student": {}, "teacher": {}}
    for batch_size in (1, 32):
        images = torch.zeros(batch_size, *input_size, device=device)
        seconds: dict[str, list[float]] = {"student": [], "teacher": []}
        end = time.perf_counter() + budget_seconds
        while len(seconds["student"]) < 4 or (time.perf_counter() < end and len(seconds["student"]) < 50):
            for who, model in (("student", student), ("teacher", teacher)):
                seconds[who].append(_time_forward(model, images))
        for who, values in seconds.items():  # the first pass warms up
            times[who][str(batch_size)] = round(1000 * statistics.median(values[1:]), 3)
    return Speed(times["teacher"], times["student"], torch.get_num_threads(), _device_name(device))


def _time_forward(model: nn.Module, images: Tensor) -> float:
    def wait() -> Any:
        return torch.cuda.synchronize() if images.is_cuda else None

    wait()
    start = time.perf_counter()
    with torch.inference_mode():
        model(images)
    wait()
    return time.perf_counter() - start


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
