"""Options are measured at once or in parts, with the same result, and each only where it can be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.factories import tiny
from tests.search.factories import lively, noise, num_params, search_of, shapes_of
from vitcompress.families.outputs import tell_outputs
from vitcompress.plans.model import Group
from vitcompress.recipe import KINDS
from vitcompress.search.candidates import find_candidates
from vitcompress.search.context import Context, make_context
from vitcompress.search.divergence import divergence
from vitcompress.search.measure import measure_options
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.options import Option, Shapes
from vitcompress.search.student import build_student

Key = tuple[str, tuple[str, ...], int]


def by_key(measured: MeasuredOptions) -> dict[Key, Option]:
    return {(o.scale, o.group.blocks, o.dial): o for o in measured.at(math.inf)}


def test_blocks_that_are_measured_in_turn_cost_the_same() -> None:
    teacher, x = lively(), noise(24)
    lines: list[str] = []
    whole = by_key(search_of(teacher, fitted=x[:16], judged=x[16:], say=lines.append).measure(KINDS, lambda done: None))
    assert not lines
    search = search_of(teacher, fitted=x[:16], judged=x[16:], memory_bytes=1.0, say=lines.append)
    parts = search.measure(KINDS, lambda done: None)
    singles = {key: option for key, option in whole.items() if len(option.group.blocks) == 1}
    assert by_key(parts).keys() == singles.keys()
    for key, option in by_key(parts).items():
        assert option.nats == pytest.approx(singles[key].nats, rel=1e-4, abs=1e-9), key
    assert parts.num_left_out == len(whole) - len(singles) > 0
    assert len(lines) == 1
    assert f"{parts.num_left_out:,} ways of sharing are left out" in lines[0]
    assert "--max-memory" in lines[0]


def test_options_within_a_part_are_measured_and_none_costs_nothing() -> None:
    """Memory for some blocks: runs that lie in one part are there, runs over two are not."""
    teacher = lively()
    x, shapes = noise(16), shapes_of(teacher, ("share",))
    measured = measure_options(shapes, x[:8], x[8:], 300_000, lambda done: None)
    runs = {option.group.blocks for option in measured.at(math.inf)}
    assert 0 < len(runs) < len(list(shapes.runs()))
    assert measured.num_left_out == 2 * (len(list(shapes.runs())) - len(runs))
    assert all(option.nats > 1e-6 for option in measured.at(math.inf))
    assert {block for run in runs for block in run} == set(shapes.blocks)


@pytest.mark.parametrize("kinds", [("narrow", "share"), ("low_rank",)])
def test_measuring_tells_how_far_it_is_and_ends_at_one(kinds: tuple[str, ...]) -> None:
    shares: list[float] = []
    search_of(tiny()).measure(kinds, shares.append)
    assert shares == sorted(shares)
    assert shares[0] == 0 < shares[1] < 0.1  # it tells of the context, block by block
    assert any(0.25 < share < 0.5 for share in shares)
    assert shares[-1] == pytest.approx(1.0)


def test_nothing_before_something_nonlinear_costs_more_than_leaving_its_part_out() -> None:
    measured = search_of(lively()).measure(("low_rank", "narrow", "skip"), lambda done: None)
    skips = {(o.group.blocks, o.part): o.nats for o in measured.at(0) if o.kind == "skip"}
    for option in measured.at(0):
        if option.scale in ("attn.qk", "attn.rank", "mlp.rank"):
            assert option.nats < skips[option.group.blocks, option.part], option


def test_each_context_is_judged_on_images_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes take turns in the images, so every other image would be of every other class."""
    seen: list[set[int]] = []

    def record(shapes: Shapes, options: object, fitted: Tensor, judged: Tensor, *more: object) -> Context:
        seen.append({int(value) for value in judged[:, 0, 0, 0]})
        return make_context(shapes, (), fitted, judged)

    monkeypatch.setattr("vitcompress.search.measure.make_context", record)
    x = (torch.arange(64) % 4).float()[:, None, None, None].expand(-1, 3, 32, 32)
    measure_options(shapes_of(tiny(), ("narrow",)), x[:32], x[32:], 1e9, lambda done: None)
    assert seen == [{0, 1, 2, 3}] * 2


def built_cost(shapes: Shapes, groups: list[Group], x: Tensor) -> float:
    """Divergence of the student whose blocks are made so, the others as in the teacher."""
    changed = {block for group in groups for block in group.blocks}
    plan = shapes.plan([*groups, *(Group((block,), ()) for block in shapes.blocks if block not in changed)])
    return divergence(build_student(plan, shapes.model, x[:64]), shapes.model, x[64:])


def told(outputs: str) -> nn.Module:
    teacher = lively(embed_dim=48)
    tell_outputs(teacher, outputs, name="tiny")
    return teacher


OUTPUTS = ["classes", "multi_label", "regression"]


@pytest.mark.broad
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_the_cost_of_a_change_in_a_whole_teacher_is_that_of_the_student_that_is_built(outputs: str) -> None:
    """These kinds are measured in the teacher itself; others are too large for a second order."""
    x, teacher = noise(160), told(outputs)
    cases = [("skip", f"{part}.skip", [f"blocks.{n}"]) for part in ("attn", "mlp") for n in (1, 2, 3)]
    cases += [("share", "mlp.share", [f"blocks.{n}", f"blocks.{n + 1}"]) for n in (0, 1)]
    for kind in ("skip", "share"):
        shapes = shapes_of(teacher, (kind,))
        measured = measure_options(shapes, x[:64], x[64:], 1e9, lambda done: None)
        assert [level.joint for level in measured.levels] == [1]
        costs = {(o.scale, o.group.blocks): o for o in measured.at(math.inf)}
        for _, scale, blocks in (case for case in cases if case[0] == kind):
            option = costs[scale, tuple(blocks)]
            assert option.nats == pytest.approx(built_cost(shapes, [option.group], x), rel=0.4), option


@pytest.mark.broad
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("kinds", [("narrow", "low_rank", "skip"), ("low_rank",), KINDS], ids=["some", "ranks", "all"])
def test_the_cost_of_a_plan_is_near_that_of_the_student_that_is_built(outputs: str, kinds: tuple[str, ...]) -> None:
    x, teacher = noise(160), told(outputs)
    shapes = shapes_of(teacher, kinds)
    measured = measure_options(shapes, x[:64], x[64:], 1e9, lambda done: None)
    for ratio in (1.5, 2.0, 3.0):
        best = find_candidates(measured, round(num_params(teacher) / ratio))[0]
        built = built_cost(shapes, list(best.plan.groups), x)
        assert 0.5 * built < best.predicted < 2 * built, (ratio, best.kinds, best.predicted, built)


def test_where_predictions_do_not_change_costs_are_not_multiplied_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitcompress.search.context.divergence", lambda *args: 0.0)
    shapes, x = shapes_of(lively(), ("narrow",)), noise(12)
    measured = measure_options(shapes, x[:8], x[8:], 1e9, lambda done: None)
    assert [level.joint for level in measured.levels] == [1, 1]
