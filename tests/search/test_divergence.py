"""The distance of two models' predictions is in nats, as the kind of the outputs defines it."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence

from tests.factories import images, tiny
from vitcompress.families.outputs import tell_outputs
from vitcompress.search.divergence import divergence, divergence_and_chance, shown_nats


@pytest.mark.parametrize("kind", ["regression", "multi_label", "classes"])
def test_the_divergence_is_in_the_teachers_own_kind(kind: str) -> None:
    count = 5 if kind == "classes" else 1
    teacher, student, x = tiny(num_classes=count), tiny(num_classes=count), images(tiny(), 40)
    tell_outputs(teacher, kind, name="tiny")
    with torch.no_grad():
        for model in (teacher, student):
            model.head.weight.mul_(100)  # type: ignore[operator, union-attr]  # or what is compared is rounding
        student.head.weight.mul_(1.1)  # type: ignore[operator, union-attr]
        p, q = teacher(x).double(), student(x).double()
    if kind == "regression":
        expected = ((p - q).square() / p.var(0, correction=0) / 2).mean()
    elif kind == "multi_label":
        expected = kl_divergence(Bernoulli(logits=p), Bernoulli(logits=q)).mean()
    else:
        expected = kl_divergence(Categorical(logits=p), Categorical(logits=q)).mean()
    assert divergence(student, teacher, x) == pytest.approx(expected.item(), rel=1e-3)
    nats, chance = divergence_and_chance(student, teacher, x)
    assert nats == pytest.approx(expected.item(), rel=1e-3)
    assert divergence(teacher, teacher, x) == 0
    assert chance > 0
    assert kind != "regression" or chance == pytest.approx(0.5, rel=1e-4)


def test_a_small_cost_is_not_shown_as_zero() -> None:
    assert [shown_nats(cost) for cost in (0.0, 0.00004, 1.23456)] == ["0.000 nats", "4e-05 nats", "1.235 nats"]
