"""A target is reached and hardly passed; out of reach, the error names one that is not."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from torch import nn

from tests.search.factories import lively, num_params, search_of
from vitcompress.errors import PlanError
from vitcompress.recipe import KINDS, TargetRecipe
from vitcompress.search.model import Chosen, Search
from vitcompress.search.student import build_student
from vitcompress.search.target import search_target
from vitcompress.surgery import apply_plan


def found(target: TargetRecipe, search: Search) -> Chosen:
    return search_target(target, search, lambda done: None)


@pytest.mark.broad
@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kinds", [KINDS, ("narrow",)], ids=["all", "narrow"])
@pytest.mark.parametrize("ratio", [1.3, 2.0, 3.5])
def test_a_ratio_is_reached_and_hardly_passed(ratio: float, kinds: tuple[Any, ...], roomy: nn.Module) -> None:
    chosen = found(TargetRecipe(target_ratio=ratio, kinds=kinds), search_of(roomy))
    student = copy.deepcopy(roomy)
    apply_plan(student, chosen.plan)
    reached = num_params(roomy) / num_params(student)
    assert ratio <= reached <= 1.02 * ratio
    assert chosen.tried[0].measured == min(c.measured for c in chosen.tried if not math.isnan(c.measured))
    assert len(chosen.reasons()) == len(chosen.tried)
    assert {name: t.shape for name, t in chosen.student.state_dict().items()} == {
        name: t.shape for name, t in student.state_dict().items()
    }


@pytest.mark.broad
@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kinds", [KINDS, ("narrow",), ("share",), ("low_rank", "basis")])
def test_a_ratio_out_of_reach_names_one_that_is_not(kinds: tuple[Any, ...], roomy: nn.Module) -> None:
    with pytest.raises(PlanError, match="--target-ratio 500 is out of reach for tiny") as error:
        found(TargetRecipe(target_ratio=500, kinds=kinds), search_of(roomy))
    most = float(error.value.hint.split("--target-ratio ")[1].split()[0])
    chosen = found(TargetRecipe(target_ratio=most, kinds=kinds), search_of(roomy))
    assert chosen.plan.size.params_ratio >= most


@pytest.mark.usefixtures("at_once")
def test_transformations_count_towards_the_ratio(roomy: nn.Module) -> None:
    chosen = found(TargetRecipe(target_ratio=2), search_of(roomy, transforms=("heads", "mlp")))
    student = copy.deepcopy(roomy)
    apply_plan(student, chosen.plan)
    assert 2 <= num_params(roomy) / num_params(student) <= 2.04


@pytest.mark.thorough
@pytest.mark.usefixtures("at_once")
def test_a_drop_is_looked_for_on_students_as_they_start(roomy: nn.Module) -> None:
    lines: list[str] = []

    def drop(student: nn.Module) -> float:
        return 100 * (1 - num_params(student) / num_params(roomy))

    chosen = found(TargetRecipe(target_drop=40, kinds=("narrow",)), search_of(roomy, drop=drop, say=lines.append))
    assert 60 <= 100 / chosen.plan.size.params_ratio <= 64
    assert all("points worse before training" in line for line in lines)
    with pytest.raises(PlanError, match=r"--target-drop 0\.5: no plan smaller than tiny") as error:
        found(TargetRecipe(target_drop=0.5, kinds=("narrow",)), search_of(roomy, drop=lambda student: 1.0))
    assert "--target-ratio" in error.value.hint


@pytest.mark.usefixtures("at_once")
def test_a_store_that_was_given_is_in_the_bytes_of_the_plan(roomy: nn.Module) -> None:
    plans = [found(TargetRecipe(target_ratio=2), search_of(roomy, store=s)).plan for s in ("source", "int8")]
    assert plans[0].groups == plans[1].groups
    assert plans[1].size.student_bytes < 0.5 * plans[0].size.student_bytes


@pytest.mark.broad
@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("store", [None, "source", "int8"])
def test_a_size_is_kept_and_made_use_of(store: str | None, roomy: nn.Module) -> None:
    limit = 150_000
    chosen = found(TargetRecipe(target_size=limit, kinds=("narrow", "low_rank")), search_of(roomy, store=store))
    assert 0.9 * limit <= chosen.plan.size.student_bytes + 1000 <= limit
    assert chosen.store == store or store is None


@pytest.mark.broad
@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("store", "limit"), [("source", 42_000), (None, 8_000)])
def test_a_size_out_of_reach_names_one_that_is_not(store: str | None, limit: int, roomy: nn.Module) -> None:
    with pytest.raises(PlanError, match=f"--target-size {limit:,} bytes is out of reach") as error:
        found(TargetRecipe(target_size=limit, kinds=("share",)), search_of(roomy, store=store))
    least = error.value.hint.split("--target-size ")[1].split(",")[0]
    again = TargetRecipe(target_size=least, kinds=("share",))  # type: ignore[arg-type]
    chosen = found(again, search_of(roomy, store=store))
    assert chosen.plan.size.student_bytes + 1000 <= int(least.removesuffix("kB")) * 1000


@pytest.mark.parametrize(("store", "rest"), [(None, 7_350), ("source", 41_876)])
def test_a_size_that_the_rest_exceeds_is_refused_before_measuring(
    store: str | None, rest: int, roomy: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(PlanError, match=f"{rest:,} bytes lie outside its blocks") as error:
        found(TargetRecipe(target_size=2000), search_of(roomy, store=store))
    assert f"{-(-rest // 1000)}kB" in error.value.hint


TARGETS = [{"target_ratio": 2.0}, {"target_size": 60_000}, {"target_drop": 40.0}]


@pytest.mark.broad
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: next(iter(target)))
def test_progress_covers_measuring_and_building(target: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, events = lively(embed_dim=48), list[float | str]()

    def drop(student: nn.Module) -> float:
        return 100 * (1 - num_params(student) / num_params(teacher))

    def build(*args: Any) -> nn.Module:
        events.append("built")
        return build_student(*args)

    monkeypatch.setattr("vitcompress.search.build.build_student", build)
    search_target(TargetRecipe(kinds=("narrow", "low_rank"), **target), search_of(teacher, drop=drop), events.append)
    shares = [event for event in events if not isinstance(event, str)]
    assert shares == sorted(shares)
    assert shares[0] == 0 < shares[1] < 0.1
    assert shares[-1] == 1.0
    builds = [number for number, event in enumerate(events) if event == "built"]
    measuring = [share for share in events[: builds[0]] if not isinstance(share, str)]
    assert len(measuring) > 5
    assert max(measuring) < 0.7
    between = [share for share in events[builds[0] :] if not isinstance(share, str)]
    assert len(between) >= len(builds)
