"""Plans are put together from options within a budget."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from tests.search.factories import num_params
from vitcompress.plans.make import make_plan
from vitcompress.recipe import PlanRecipe
from vitcompress.search.candidates import find_candidates, smallest_plan
from vitcompress.search.measure import MeasuredOptions


def test_narrow_blocks_go_as_far_as_by_hand(roomy: nn.Module, measured: MeasuredOptions) -> None:
    by_hand = make_plan(roomy, PlanRecipe(share=1, width=0.05), name="roomy")
    alone = MeasuredOptions(replace(measured.shapes, kinds=("narrow",)), measured.singles, measured.runs)
    assert smallest_plan(alone, 3, ()).size.student_params <= by_hand.size.student_params


def test_a_budget_of_the_whole_model_leaves_it_alone(measured: MeasuredOptions, roomy: nn.Module) -> None:
    plan = find_candidates(measured, num_params(roomy), 3, ())[0].plan
    assert plan.size.student_params == num_params(roomy)
    assert smallest_plan(measured, 3, ()).size.student_params < num_params(roomy) / 5
