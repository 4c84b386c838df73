import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from vitcompress.data import Batch
from vitcompress.distill import DivergedError, TrainLog, distill, lr_factor, parameter_groups
from vitcompress.recipe import DistillRecipe
from vitcompress.taps import tap_outputs

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
        yield Batch(x, torch.zeros(len(x), dtype=torch.int64), ())


def train(student: nn.Module, teacher: nn.Module, x: torch.Tensor, steps: int, **recipe: Any) -> tuple[TrainLog, Steps]:
    ticker = Steps()
    log = distill(
        student,
        teacher,
        batches(x, steps),  # type: ignore[arg-type]
        DistillRecipe(**recipe),
        blocks=BLOCKS,
        accelerator=Accelerator(cpu=True),
        ticker=ticker,
        num_steps=steps,
    )
    return log, ticker


@pytest.mark.parametrize("loss", [{"logits": 1.0}, {"hidden": 1.0}, {"logits": 1.0, "hidden": 1.0}], ids=str)
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


def test_a_loss_that_is_not_finite_restores_the_last_good_state() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=2)
    x = images(teacher, 8)
    start = student(x)
    with pytest.raises(DivergedError, match="not finite after step 1") as caught:
        train(student, teacher, x, 9, lr=1e18, warmup=0.0)
    assert torch.equal(student(x), start)
    assert caught.value.log.steps == 1
    assert "--lr" in caught.value.hint


def test_only_matrices_decay_and_each_once() -> None:
    student, _ = compressed(tiny(), share=4)
    decay, plain = parameter_groups(student, DistillRecipe(weight_decay=0.05))
    names = {id(p): name for name, p in student.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    assert decayed == {
        "patch_embed.proj.weight", "head.weight",
        *(f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }  # fmt: skip
    assert len(decay["params"]) + len(plain["params"]) == len(names)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    assert lr_factor(0.05, 0.1) == pytest.approx(0.5)
    assert lr_factor(0.1, 0.1) == 1.0
    assert lr_factor(0.55, 0.1) == pytest.approx(0.5)
    assert lr_factor(1.0, 0.1) == pytest.approx(0.0)
    assert lr_factor(0.0, 0.0) == 1.0


def test_the_loss_curve_stays_short() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=4)
    log, _ = train(student, teacher, images(teacher, 1), 450, loss={"logits": 1.0})
    assert 100 <= len(log.loss_curve) < 200
    steps = [point["step"] for point in log.loss_curve]
    assert steps == sorted(set(steps))


def test_taps_see_each_pass_anew_and_leave() -> None:
    model = tiny()
    x = images(model)
    with tap_outputs(model, BLOCKS) as seen:
        model(x)
        model(x)
        assert len(seen) == 4
        torch.testing.assert_close(model.forward_head(model.norm(seen[-1])), model(x))  # type: ignore[operator]
    assert not model._forward_pre_hooks
    assert not any(module._forward_hooks for module in model.modules())
