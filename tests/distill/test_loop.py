import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.factories import compressed, images, tiny
from vitcompress.data.augmentation import Mixing
from vitcompress.data.loaders import Batch
from vitcompress.distill.log import TrainLog
from vitcompress.distill.loop import distill
from vitcompress.distill.losses import LOSSES
from vitcompress.distill.matching import ComparedModel, match_models
from vitcompress.distill.settings import TrainSettings
from vitcompress.distill.state import DivergedError
from vitcompress.recipe import DistillRecipe

BLOCKS = [f"blocks.{i}" for i in range(4)]


class Steps:
    """A ticker that records losses and progress."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.done: list[float] = []

    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        self.losses.append(loss)
        self.done.append(done)


def batches(x: torch.Tensor, steps: int) -> Iterator[Batch]:
    for _ in range(steps):
        yield Batch(x, torch.arange(len(x)) % 5, ())


def train(student: nn.Module, teacher: nn.Module, x: torch.Tensor, steps: int, **recipe: Any) -> tuple[TrainLog, Steps]:
    ticker = Steps()
    distill_recipe = DistillRecipe(**recipe)
    size = (x.shape[1], x.shape[2], x.shape[3])
    student_model, teacher_model = ComparedModel("student", student, size), ComparedModel("teacher", teacher, size)
    settings = TrainSettings(
        distill_recipe,
        match_models(student_model, teacher_model, distill_recipe),
        blocks=BLOCKS,
        matrices=frozenset(name for name, p in student.named_parameters() if "blocks." in name and p.ndim == 2),
        input_size=size,
        num_steps=steps,
        mixing=Mixing(num_classes=5 if "labels" in (distill_recipe.loss or {}) else None),
    )
    log = distill(
        student,
        teacher,
        lambda start: batches(x, steps * distill_recipe.accumulate),
        settings,
        accelerator=Accelerator(cpu=True),
        ticker=ticker,
    )
    return log, ticker


OF_LOGITS = [name for name in LOSSES if name != "features"]


@pytest.mark.broad
@pytest.mark.parametrize(
    "loss",
    [*({name: 1.0} for name in OF_LOGITS), dict.fromkeys(OF_LOGITS[:-1], 1.0), {"features": 1.0}],
    ids=str,
)
def test_the_student_comes_closer_to_the_teacher(loss: dict[str, float]) -> None:
    teacher = tiny(num_classes=0) if "features" in loss else tiny()
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


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_loss_that_is_not_finite_restores_the_last_good_state(ema: float | None) -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=2)
    x = images(teacher, 8)
    start = student(x)
    with pytest.raises(DivergedError, match="not finite after step 1") as caught:
        train(student, teacher, x, 9, lr=1e18, warmup=0.0, ema=ema)
    assert torch.equal(student(x), start)
    assert caught.value.log.steps == 1
    assert "--lr" in caught.value.hint


def test_the_student_ends_as_the_mean_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step counts fully, the second 9/11, the third 9/12, as --ema 0.9 starts."""
    teacher = tiny()
    student, plan = compressed(teacher, share=2)
    weight = student.get_parameter("blocks.0.mlp.fc1.weight")
    after: list[torch.Tensor] = []
    monkeypatch.setattr(Steps, "step", lambda self, **told: after.append(weight.detach().clone()))
    train(student, teacher, images(teacher, 8), 3, lr=1e-2, ema=0.9)
    expected = after[0].lerp(after[1], 9 / 11).lerp(after[2], 9 / 12)
    torch.testing.assert_close(weight.detach(), expected)
    assert not torch.allclose(expected, after[2])
    assert sum(p.numel() for p in student.parameters()) == plan.size.student_params


def test_a_loss_of_labels_alone_needs_no_teacher() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=2)
    ran: list[int] = []
    handle = teacher.register_forward_hook(lambda *call: ran.append(1))
    train(student, teacher, images(teacher, 8), 2, loss={"labels": 1.0})
    assert len(ran) == 1  # on the meta device, to match the models
    train(student, teacher, images(teacher, 8), 2, loss={"labels": 1.0, "logits": 1.0})
    assert len(ran) == 1 + 1 + 2
    handle.remove()


def test_relations_of_few_tokens_still_teach() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=4)
    loss = {"attention": 1.0, "hidden_relation": 1.0}
    _, ticker = train(
        student, teacher, images(teacher, 16), 30, loss=loss, lr=1e-3, max_relation_tokens=6, relation_heads=3,
        layers="1,3", grad_checkpointing=True,
    )  # fmt: skip
    assert sum(ticker.losses[-3:]) < 0.8 * sum(ticker.losses[:3])  # each step uses other tokens


@pytest.mark.thorough
def test_the_loss_curve_stays_short() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=4)
    log, _ = train(student, teacher, images(teacher, 1), 450, loss={"logits": 1.0})
    assert 100 <= len(log.loss_curve) < 200
    steps = [point["step"] for point in log.loss_curve]
    assert steps == sorted(set(steps))
