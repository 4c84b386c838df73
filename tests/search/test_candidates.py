"""Plans are put together from options within a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from tests.search.factories import num_params
from vitcompress.families.widths import Widths
from vitcompress.plans.make import make_plan, plan_of
from vitcompress.plans.model import Group
from vitcompress.recipe import PlanRecipe
from vitcompress.search.candidates import even_widths, find_candidates, smallest_plan
from vitcompress.search.measure import MeasuredOptions


@pytest.mark.thorough
def test_narrow_blocks_go_as_far_as_by_hand(roomy: nn.Module, measured: MeasuredOptions) -> None:
    by_hand = make_plan(roomy, PlanRecipe(share=1, width=0.05), name="roomy")
    alone = MeasuredOptions(replace(measured.shapes, kinds=("narrow",)), measured.singles, measured.runs)
    assert smallest_plan(alone).size.student_params <= by_hand.size.student_params


def test_a_budget_of_the_whole_model_leaves_it_alone(measured: MeasuredOptions, roomy: nn.Module) -> None:
    plan = find_candidates(measured, num_params(roomy))[0].plan
    assert plan.size.student_params == num_params(roomy)
    assert smallest_plan(measured).size.student_params < num_params(roomy) / 5


def test_widths_are_brought_nearer_to_one_another_within_the_budget(
    roomy: nn.Module, measured: MeasuredOptions
) -> None:
    shapes = measured.shapes
    uneven = [
        Group((block,), (), widths=Widths(hidden=30 + 120 * (number % 2))) for number, block in enumerate(shapes.blocks)
    ]
    plan = plan_of(roomy, shapes.family, uneven, (), 3)
    budget = plan.size.student_params
    spreads = []
    for share in (1.0, 0.5, 0.0):
        made = even_widths(plan, shapes, budget, share)
        assert made is not None
        assert 0.985 * budget <= made.size.student_params <= budget
        hidden = [group.widths.hidden or 0 for group in made.groups]
        spreads.append(max(hidden) / min(hidden))
    assert spreads[0] > spreads[1] > spreads[2]
    assert spreads[2] < 1.1


def test_blocks_that_share_or_have_factors_are_not_made_even(roomy: nn.Module, measured: MeasuredOptions) -> None:
    shapes = measured.shapes
    shared = Group(tuple(shapes.blocks[:2]), ("mlp.fc1.weight",))
    groups = [shared, *(Group((block,), ()) for block in shapes.blocks[2:])]
    plan = plan_of(roomy, shapes.family, groups, (), 3)
    assert even_widths(plan, shapes, plan.size.student_params, 0.5) is None
    narrow = [shared, *(Group((block,), (), widths=Widths(hidden=9)) for block in shapes.blocks[2:])]
    plan = plan_of(roomy, shapes.family, narrow, (), 3)
    made = even_widths(plan, shapes, plan.size.student_params, 0.5)
    assert made is not None
    assert made.groups[0] == shared
