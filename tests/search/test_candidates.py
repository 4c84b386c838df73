"""Plans are put together from options within a budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from tests.search.factories import lively, noise, num_params, shapes_of
from vitcompress.plans.make import make_plan
from vitcompress.plans.model import Group
from vitcompress.recipe import PlanRecipe
from vitcompress.search.candidates import find_candidates, smallest_plan
from vitcompress.search.measure import measure_options
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.options import Option


def of_kinds(measured: MeasuredOptions, *kinds: str) -> MeasuredOptions:
    return MeasuredOptions(replace(measured.shapes, kinds=kinds), measured.options, measured.levels)


@pytest.mark.thorough
def test_narrow_blocks_go_as_far_as_by_hand(roomy: nn.Module, measured: MeasuredOptions) -> None:
    by_hand = make_plan(roomy, PlanRecipe(share=1, width=0.25), name="roomy")
    assert smallest_plan(of_kinds(measured, "narrow")).size.student_params <= by_hand.size.student_params


def test_a_budget_of_the_whole_model_leaves_it_alone(measured: MeasuredOptions, roomy: nn.Module) -> None:
    best = find_candidates(measured, num_params(roomy))[0]
    assert best.plan.size.student_params == num_params(roomy)
    assert best.predicted == 0
    assert smallest_plan(measured).size.student_params < num_params(roomy) / 5


@pytest.mark.parametrize("ratio", [1.2, 2.0, 4.0])
def test_candidates_keep_the_budget_and_the_cheapest_is_first(
    ratio: float, measured: MeasuredOptions, roomy: nn.Module
) -> None:
    budget = round(num_params(roomy) / ratio)
    candidates = find_candidates(measured, budget)
    sizes = [candidate.plan.size.student_params for candidate in candidates]
    assert all(size <= budget for size in sizes)
    assert sizes[0] >= 0.98 * budget
    costs = [candidate.predicted for candidate in candidates]
    assert costs == sorted(costs)
    assert all(cost > 0 for cost in costs)
    assert all(candidate.measured != candidate.measured for candidate in candidates)  # nan: nothing is built yet
    assert len({repr(candidate.plan.groups) for candidate in candidates}) == len(candidates)
    assert len({candidate.kinds for candidate in candidates}) == len(candidates) > 1
    alone = find_candidates(of_kinds(measured, "narrow"), budget)
    assert not alone or candidates[0].predicted <= alone[0].predicted + 1e-12
    assert not alone or alone[0].kinds == ("narrow",)


def test_a_budget_below_the_smallest_plan_has_no_candidates(measured: MeasuredOptions) -> None:
    smallest = smallest_plan(measured).size.student_params
    assert find_candidates(measured, smallest)
    assert not find_candidates(measured, smallest - 1)


def contained(option: Option, group: Group) -> bool:
    """Whether a group of a plan holds an option."""

    def of_part(names: Any) -> Any:
        return {name: names[name] if isinstance(names, dict) else None for name in names if name[: len(part)] == part}

    part, own = option.part, option.group
    if own.blocks != group.blocks:
        return False
    if option.kind == "narrow":
        name = option.scale.split(".")[1]
        return bool(getattr(own.widths, name) == getattr(group.widths, name))
    return all(
        of_part(getattr(own, field)) == of_part(getattr(group, field))
        for field in ("shared", "ranks", "bases", "skipped")
    )


@pytest.mark.parametrize("ratio", [1.5, 3.0])
def test_what_a_plan_costs_is_the_sum_of_its_options_costs_at_its_size(
    ratio: float, measured: MeasuredOptions, roomy: nn.Module
) -> None:
    kinds, counts, budget = measured.shapes.kinds, [], round(num_params(roomy) / ratio)
    costs = [option for options in measured._slots(kinds, budget).values() for option in options]
    for candidate in find_candidates(measured, budget):
        options = [o for group in candidate.plan.groups for o in costs if contained(o, group)]
        counts.append(len(options))
        saved_params = num_params(roomy) - candidate.plan.size.student_params
        assert sum(option.saved_params for option in options) == saved_params
        assert candidate.predicted == pytest.approx(sum(option.nats for option in options), rel=1e-6)
    assert max(counts) > 6


def test_a_multiple_of_all_costs_changes_predictions_and_no_plan(measured: MeasuredOptions, roomy: nn.Module) -> None:
    dear = replace(measured, levels=[replace(level, joint=3 * level.joint) for level in measured.levels])
    found, dearer = (find_candidates(each, num_params(roomy) // 2) for each in (measured, dear))
    assert [candidate.plan for candidate in dearer] == [candidate.plan for candidate in found]
    for one, other in zip(found, dearer, strict=True):
        assert other.predicted == pytest.approx(3 * one.predicted)


@pytest.mark.broad
@pytest.mark.parametrize("multiple", [8, 1])
def test_all_widths_of_a_plan_are_multiples(multiple: int) -> None:
    teacher, x = lively(embed_dim=128, num_heads=2, depth=3), noise(12)  # 64 channels per head
    measured = measure_options(shapes_of(teacher, multiple=multiple), x[:8], x[8:], 1e9, lambda done: None)
    widths: dict[str, set[int]] = {"qk": set(), "v": set(), "hidden": set()}
    for ratio in (1.3, 1.7, 2.5):
        for candidate in find_candidates(measured, round(num_params(teacher) / ratio)):
            for group in candidate.plan.groups:
                for name, found in widths.items():
                    found |= {width for width in [getattr(group.widths, name)] if width}
    assert all(widths.values())
    assert all(width % multiple == 0 for name in ("qk", "v") for width in widths[name])
    if multiple == 8:
        assert all(width % 16 == 0 for width in widths["hidden"])
    else:
        assert any(width % 16 for width in widths["hidden"])
