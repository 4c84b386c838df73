"""Only candidates that may be the best are built, and the student of the best is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.search.factories import num_params, search_of
from vitcompress.search.build import MAX_BUILT, SURE, build_best
from vitcompress.search.candidates import Candidate, find_candidates
from vitcompress.search.divergence import divergence
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.model import choose
from vitcompress.search.student import build_student


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Plans of students that are built, in order."""
    plans: list[Any] = []

    def build(plan: Any, *rest: Any) -> nn.Module:
        plans.append(plan)
        return nn.Linear(1, 1)

    monkeypatch.setattr("vitcompress.search.build.build_student", build)
    return plans


def candidates_that_cost(measured: MeasuredOptions, roomy: nn.Module, costs: Sequence[float]) -> list[Candidate]:
    plan = find_candidates(measured, num_params(roomy) // 2)[0].plan
    return [Candidate(("narrow",), replace(plan, why=(str(n),)), cost) for n, cost in enumerate(costs)]


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([1.0], 1), ([1.0, 1.01 * SURE], 1), ([1.0, 0.99 * SURE, 2 * SURE], 2), ([1.0, 1.0, 1.0, 1.0, 1.0], MAX_BUILT),
    ],
)  # fmt: skip
def test_what_is_likely_the_best_is_built(
    costs: list[float], expected: int, roomy: nn.Module, measured: MeasuredOptions, built: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("vitcompress.search.build.divergence", lambda *args: 1.0)
    candidates = candidates_that_cost(measured, roomy, costs)
    shares: list[float] = []
    tried, _ = build_best(candidates, search_of(roomy), shares.append)
    assert built == [candidate.plan for candidate in candidates[:expected]]
    assert [c.measured == 1.0 for c in tried] == [True] * expected + [False] * (len(costs) - expected)
    assert shares == [(n + 1) / expected for n in range(expected)]


def test_the_best_measured_is_first_and_its_student_is_returned(
    roomy: nn.Module, measured: MeasuredOptions, built: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    students = [nn.Linear(1, 1) for _ in range(3)]
    order = iter(students)
    monkeypatch.setattr("vitcompress.search.build.build_student", lambda *args: next(order))
    costs = dict(zip(map(id, students), (0.3, 0.1, 0.2), strict=True))
    monkeypatch.setattr("vitcompress.search.build.divergence", lambda student, *rest: costs[id(student)])
    candidates = candidates_that_cost(measured, roomy, [1.0, 1.1, 1.2, 5.0])
    tried, student = build_best(candidates, search_of(roomy), lambda done: None)
    assert [c.plan.why for c in tried] == [("1",), ("2",), ("0",), ("3",)]
    assert [c.measured for c in tried[:3]] == [0.1, 0.2, 0.3]
    assert student is students[1]
    chosen = choose(tried, student, search_of(roomy), "source")
    assert chosen.student is student
    lines = chosen.reasons()
    assert len(lines) == 4
    assert lines[0].endswith("0.100 nats measured")
    assert lines[1].endswith("0.200 nats measured, 0.100 nats worse")
    assert "5.000 nats predicted, not built" in lines[3]


def test_what_was_not_built_is_compared_as_predicted(roomy: nn.Module, measured: MeasuredOptions) -> None:
    best, other = candidates_that_cost(measured, roomy, [1.0, 5.0])
    chosen = choose([replace(best, measured=0.9), other], nn.Linear(1, 1), search_of(roomy), "source")
    assert chosen.reasons()[-1].endswith("5.000 nats predicted, not built, 4.000 nats worse")
    assert choose([best], nn.Linear(1, 1), search_of(roomy), "source").reasons()[-1].endswith("not built")


def test_the_students_cost_is_what_is_reported(roomy: nn.Module, measured: MeasuredOptions) -> None:
    search = search_of(roomy)
    candidates = find_candidates(measured, num_params(roomy) // 2)
    tried, student = build_best(candidates, search, lambda done: None)
    assert num_params(student) == tried[0].plan.size.student_params
    assert tried[0].measured == divergence(student, roomy, search.judged)
    assert not student.training
    again = build_student(tried[0].plan, roomy, search.fitted)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in student.state_dict().items())
