"""Latencies."""

import pytest
import torch

from tests.factories import compressed, tiny
from vitcompress.measure.latency import measure_speed


@pytest.mark.thorough
def test_speed_of_both_at_both_batch_sizes() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=2)
    speed = measure_speed(student, teacher, (3, 32, 32), device=torch.device("cpu"), budget_seconds=0.0)
    assert set(speed.teacher_ms) == set(speed.student_ms) == {"1", "32"}
    assert all(ms > 0 for ms in (*speed.teacher_ms.values(), *speed.student_ms.values()))
