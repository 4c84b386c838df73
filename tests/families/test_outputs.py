"""What a model's outputs are is decided once, and each kind has a distance of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from vitcompress.distill.losses import OUTPUT_LOSSES
from vitcompress.errors import ModelError
from vitcompress.families.outputs import (
    CLASSES,
    FEATURES,
    KINDS,
    MULTI_LABEL,
    REGRESSION,
    OutputKind,
    count_classes,
    deviation_of,
    outputs_of,
    tell_outputs,
)
from vitcompress.measure.examples import DIFFERENCES
from vitcompress.measure.tally import TALLIES
from vitcompress.report.kinds import KIND_WORDS


def model(num_outputs: int, told: str | None = None) -> Any:
    made: Any = SimpleNamespace(num_classes=num_outputs)
    tell_outputs(made, told, name="tiny")
    return made


@pytest.mark.parametrize(
    ("num_outputs", "told", "expected"),
    [
        (0, None, "features"),
        (1, None, "regression"),
        (1, "multi_label", "multi_label"),
        (5, None, "classes"),
        (5, "classes", "classes"),
        (5, "multi_label", "multi_label"),
        (5, "regression", "regression"),
    ],
)
def test_the_kind_is_as_told_or_by_the_number_of_outputs(num_outputs: int, told: str | None, expected: str) -> None:
    assert outputs_of(model(num_outputs, told)).name == expected
    assert count_classes(model(num_outputs, told)) == (num_outputs if expected == "classes" else 0)


def test_a_model_of_no_kind_gives_features() -> None:
    assert outputs_of(torch.nn.Identity()) is FEATURES


@pytest.mark.parametrize(("num_outputs", "told", "words"), [(0, "regression", "no head"), (1, "classes", "one output")])
def test_a_kind_that_cannot_be_is_refused(num_outputs: int, told: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        model(num_outputs, told)
    assert "--outputs" in str(caught.value) + caught.value.hint


def test_every_kind_has_an_entry_in_every_table() -> None:
    assert set(TALLIES) == set(DIFFERENCES) == set(KIND_WORDS) == set(KINDS)
    assert set(OUTPUT_LOSSES) == {kind.name for kind in KINDS.values() if kind.loss == "logits"}


@pytest.fixture
def outputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=generator), 2 * torch.randn(6, 4, generator=generator)


def test_the_distance_of_each_kind_is_the_kl_of_its_distribution(outputs: tuple[Tensor, Tensor]) -> None:
    student, teacher = outputs
    deviation = deviation_of(teacher)
    pairs: dict[str, tuple[Any, Any]] = {
        "classes": (Categorical(logits=teacher), Categorical(logits=student)),
        "multi_label": (Bernoulli(logits=teacher), Bernoulli(logits=student)),
        "regression": (Normal(teacher, deviation), Normal(student, deviation)),
    }
    for name, (p, q) in pairs.items():
        nats = KINDS[name].nats
        assert nats is not None
        expected = kl_divergence(p, q)
        expected = expected.sum(-1) if expected.ndim > 1 else expected
        torch.testing.assert_close(nats(student, teacher, deviation), expected, rtol=1e-4, atol=1e-5)
        assert nats(teacher, teacher, deviation).abs().max() < 1e-6


def test_the_mean_prediction_has_the_mean_probabilities_or_numbers(outputs: tuple[Tensor, Tensor]) -> None:
    _, teacher = outputs
    torch.testing.assert_close(CLASSES.mean(teacher).softmax(-1), teacher.softmax(-1).mean(0))
    torch.testing.assert_close(MULTI_LABEL.mean(teacher).sigmoid(), teacher.sigmoid().mean(0))
    assert REGRESSION.nats is not None
    mean = REGRESSION.mean(teacher).expand_as(teacher)
    chance = REGRESSION.nats(mean, teacher, deviation_of(teacher)).mean()
    assert chance.item() == pytest.approx(4 / 2, rel=1e-5)  # half a nat for each number
    sure = torch.full((3, 2), 300.0)  # probabilities of 1 to the last bit
    assert MULTI_LABEL.nats is not None
    assert torch.isfinite(MULTI_LABEL.nats(MULTI_LABEL.mean(sure).expand_as(sure), sure, sure)).all()


def test_the_gradient_of_a_score_has_the_fisher_information_as_its_variance() -> None:
    logits = torch.tensor([[0.5, -1.0]])
    deviation = torch.tensor([2.0, 0.5])
    many = logits.expand(20_000, 2).clone().requires_grad_()
    expected = {"multi_label": logits.sigmoid() * (1 - logits.sigmoid()), "regression": deviation[None] ** -2}
    for name, information in expected.items():
        score = KINDS[name].score(many, deviation, torch.Generator().manual_seed(0))
        (grad,) = torch.autograd.grad(score, many)
        torch.testing.assert_close(grad.square().mean(0, keepdim=True), information, rtol=0.05, atol=0)


def test_the_deviation_is_that_over_images_and_never_zero() -> None:
    numbers = torch.tensor([[1.0, 1000.0, 0.0], [3.0, 1000.0, 0.0]])
    assert deviation_of(numbers).tolist() == pytest.approx([1.0, 0.1, 1.0])
    assert deviation_of(numbers[1:]).tolist() == [3.0, 1000.0, 1.0]  # one image: its size


@pytest.mark.parametrize("kind", [CLASSES, MULTI_LABEL, REGRESSION], ids=lambda kind: kind.name)
def test_the_covariance_of_directions_is_the_fisher_information(kind: OutputKind) -> None:
    """Of what the outputs mean: the second derivatives of the divergence, here in closed form."""
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0], dtype=torch.double)
    deviation, count = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.double), 40_000
    leaf = logits.repeat(count, 1).requires_grad_()
    score = kind.score(leaf, deviation, torch.Generator().manual_seed(0))
    (directions,) = torch.autograd.grad(score, leaf)
    assert score.item() == pytest.approx(float((directions * leaf).sum().detach()), rel=1e-6)  # linear in the outputs
    p, q = logits.softmax(-1), logits.sigmoid()
    expected = {
        "classes": p.diag() - p.outer(p), "multi_label": (q * (1 - q)).diag(), "regression": deviation.pow(-2).diag(),
    }[kind.name]  # fmt: skip
    torch.testing.assert_close(directions.T @ directions / count, expected, rtol=0.03, atol=0.03)
    assert kind.nats is not None
    nats = kind.nats  # and it is that of the divergence
    hessian = torch.autograd.functional.hessian(lambda x: nats(x[None], logits[None], deviation).sum(), logits)
    torch.testing.assert_close(hessian, expected)


def test_directions_of_classes_do_not_move_all_logits_alike() -> None:
    leaf = torch.randn(7, 5).requires_grad_()
    score = CLASSES.score(leaf, torch.ones(1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.autograd.grad(score, leaf)[0].sum(-1), torch.zeros(7), rtol=0, atol=1e-6)
