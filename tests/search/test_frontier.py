"""The best plans for many budgets, and the knee."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.factories import images, tiny
from tests.search.factories import ROOMY, num_params
from vitcompress.families.registry import family_of
from vitcompress.plans.model import Plan
from vitcompress.search.candidates import find_candidates, smallest_plan
from vitcompress.search.frontier import COMMON_RATIOS, FrontierPoint, knee_of, target_ratios, trace_frontier
from vitcompress.search.measure import measure_options
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.options import Shapes


@pytest.fixture(scope="module")
def measured() -> MeasuredOptions:
    model = tiny(**{**ROOMY, "depth": 4})
    family = family_of(model, "tiny")
    noise = images(model, 12)
    shapes = Shapes(model, family, family.block_names(model), ("narrow", "skip"), (), 3)
    return measure_options(shapes, noise[:8], noise[8:], 1e12, lambda done: None)


def sized(plan: Plan) -> Plan:
    return replace(plan, size=replace(plan.size, student_macs=7))


@pytest.fixture(scope="module")
def points(measured: MeasuredOptions) -> list[FrontierPoint]:
    return trace_frontier(measured, sized, lambda done: None)


def test_points_are_the_plans_that_targets_give(measured: MeasuredOptions, points: list[FrontierPoint]) -> None:
    whole = num_params(measured.shapes.model)
    for point in points:
        best = find_candidates(measured, math.floor(whole / point.target_ratio))[0]
        assert point.size.student_params == best.plan.size.student_params
        assert (point.predicted_nats, point.kinds) == (best.predicted, best.kinds)
        assert point.size.params_ratio >= point.target_ratio - 1e-3
        assert point.size.student_macs == 7


def test_points_lead_from_the_whole_model_to_the_smallest_plan(
    measured: MeasuredOptions, points: list[FrontierPoint]
) -> None:
    sizes = [point.size.student_params for point in points]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes) >= 8
    smallest = smallest_plan(measured).size
    assert sizes[-1] == smallest.student_params
    common = [point.target_ratio for point in points if point.is_common]
    assert common == [ratio for ratio in COMMON_RATIOS if ratio <= smallest.params_ratio]
    others = [point for point in points if not point.is_common]
    for point in others:  # what costs no less than something smaller is left out
        smaller = [other for other in points if other.size.student_params < point.size.student_params]
        assert all(point.predicted_nats < other.predicted_nats for other in smaller)


def test_at_most_one_point_is_the_knee(points: list[FrontierPoint]) -> None:
    assert sum(point.is_knee for point in points) <= 1


def test_progress_never_falls_and_ends_at_one(measured: MeasuredOptions) -> None:
    told: list[float] = []
    trace_frontier(measured, sized, told.append)
    assert told == sorted(told)
    assert told[-1] == 1


@pytest.mark.parametrize("highest", [1.1, 2.0, 3.7, 8.0, 135.0])
def test_common_ratios_in_reach_are_among_the_targets(highest: float) -> None:
    ratios = target_ratios(highest)
    assert ratios == sorted(set(ratios))
    assert ratios[-1] == highest
    assert ratios[0] > 1
    assert {ratio for ratio in COMMON_RATIOS if ratio <= highest} <= set(ratios)
    assert len(ratios) <= 16 + 1


def test_the_knee_is_farthest_below_the_chord() -> None:
    # chord from (10, 90) to (100, 0): below it by 0, 10, 60, 50, 20
    points = [(80.0, 0.0), (50.0, 0.0), (30.0, 10.0), (20.0, 70.0), (10.0, 90.0)]
    assert knee_of(points, 100.0) == 2
    assert knee_of(points[::-1], 100.0) == 2


@pytest.mark.parametrize(
    "points", [[], [(10.0, 1.0)], [(50.0, 1.0), (10.0, 2.0)], [(55.0, 60.0), (40.0, 80.0), (10.0, 90.0)]]
)
def test_without_a_bend_there_is_no_knee(points: list[tuple[float, float]]) -> None:
    assert knee_of(points, 100.0) is None
