import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from vitcompress.compare import Candidate, compare
from vitcompress.data import Batch
from vitcompress.distill import Length, distill
from vitcompress.mixing import Mixing
from vitcompress.recipe import LOSSES, DistillRecipe
from vitcompress.trainlog import DivergedError, TrainLog

from .tiny import compressed, images, tiny

BLOCKS = [f"blocks.{i}" for i in range(4)]


class Steps:
    """A ticker that remembers."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.done: list[float] = []

    def step(self, *, done: float, loss: float, images_per_second: float) -> None:
        self.losses.append(loss)
        self.done.append(done)


def batches(x: torch.Tensor, steps: int) -> Iterator[Batch]:
    for _ in range(steps):
        yield Batch(x, torch.arange(len(x)) % 5, ())


def train(student: nn.Module, teacher: nn.Module, x: torch.Tensor, steps: int, **recipe: Any) -> tuple[TrainLog, Steps]:
    ticker = Steps()
    asked = DistillRecipe(**recipe)
    size = (x.shape[1], x.shape[2], x.shape[3])
    log = distill(
        student,
        teacher,
        batches(x, steps),  # type: ignore[arg-type]
        asked,
        blocks=BLOCKS,
        comparison=compare(Candidate("student", student, size), Candidate("teacher", teacher, size), asked),
        mixing=Mixing(num_classes=5 if "labels" in asked.loss else None),
        accelerator=Accelerator(cpu=True),
        ticker=ticker,
        length=Length(steps),
    )
    return log, ticker


@pytest.mark.parametrize("loss", [*({name: 1.0} for name in LOSSES), dict.fromkeys(LOSSES[:-1], 1.0)], ids=str)
def test_the_student_comes_closer_to_the_teacher(loss: dict[str, float]) -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=4)
    log, ticker = train(student, teacher, images(teacher, 16), 30, loss=loss, lr=3e-3)
    assert ticker.losses[-1] < 0.6 * ticker.losses[0]
    assert ticker.done == pytest.approx([(i + 1) / 30 for i in range(30)])
    assert (log.steps, log.images) == (30, 480)
    assert set(log.loss_curve[0]) == {"step", "lr", "loss", *loss}
    assert log.loss_curve[-1]["step"] == 30


def test_sharing_and_the_teacher_survive_training() -> None:
    teacher = tiny()
    student, plan = compressed(teacher, share=2)
    before = copy.deepcopy(teacher.state_dict())
    train(student, teacher, images(teacher, 8), 3)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert sum(p.numel() for p in student.parameters()) == plan.size.student_params
    assert student.blocks[0].mlp.fc1.weight is student.blocks[1].mlp.fc1.weight  # type: ignore[index, union-attr]
    assert not student.training
    assert not teacher.training


@pytest.mark.parametrize("lr", [1e18, math.inf])
def test_a_loss_that_is_not_finite_restores_the_last_good_state(lr: float) -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=2)
    x = images(teacher, 8)
    start = student(x)
    with pytest.raises(DivergedError, match="not finite at step 2") as caught:
        train(student, teacher, x, 9, lr=lr, warmup=0.0)
    assert torch.equal(student(x), start)
    assert caught.value.log.steps == 1
    assert "--lr" in caught.value.hint


def test_the_loss_curve_stays_short() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=4)
    log, _ = train(student, teacher, images(teacher, 1), 450, loss={"logits": 1.0})
    assert 100 <= len(log.loss_curve) < 200
    steps = [point["step"] for point in log.loss_curve]
    assert steps == sorted(set(steps))
