"""Choices cost less the more they keep, and add up what their options cost."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from tests.factories import tiny
from tests.search.factories import shapes_of
from vitcompress.search.measured import MIN_NATS, Level, MeasuredOptions
from vitcompress.search.options import list_options


def with_costs(kinds: tuple[str, ...], factor: float = 8.0) -> MeasuredOptions:
    """Costs that rise by `factor` from block to block; with noise, they do not fall with width."""
    shapes = shapes_of(tiny(embed_dim=48, depth=3), kinds)
    draw = torch.Generator().manual_seed(0)
    options, costs = list_options(shapes), []
    for option in options:
        noise = float(0.5 + torch.rand((), generator=draw))
        cost = factor ** shapes.blocks.index(option.group.blocks[0]) * noise / (1 + option.dial)
        costs.append(cost)
    return MeasuredOptions(shapes, options, [Level(shapes.params(shapes.blocks), costs)])


def costs(measured: MeasuredOptions, kinds: tuple[str, ...]) -> dict[str, dict[int, float]]:
    """Costs of neurons by block and number, of those choices that change nothing else."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for slot, options in measured._slots(kinds, 1).items():
        if slot[1] == "mlp.hidden":
            found[slot[0][0]] = {option.dial: option.nats for option in options}
    return found


def test_what_keeps_more_costs_less() -> None:
    measured = with_costs(("narrow",))
    raw = [o.nats for o in measured.at(1) if o.scale == "mlp.hidden" and o.group.blocks == ("blocks.0",)]
    assert raw != sorted(raw, reverse=True)  # noise
    for by_dial in costs(measured, ("narrow",)).values():
        ordered = [by_dial[dial] for dial in sorted(by_dial)]
        assert all(more < less for less, more in itertools.pairwise(ordered))


def test_costs_that_fall_by_themselves_stay_as_measured() -> None:
    measured = with_costs(("narrow",))
    falling = Level(1, [1.0 / option.dial for option in measured.options])
    for by_dial in costs(replace(measured, levels=[falling]), ("narrow",)).values():
        for dial, cost in by_dial.items():
            assert cost == pytest.approx(1.0 / dial, rel=1e-5)


def test_choices_are_of_the_kinds_asked_for_and_add_up() -> None:
    measured = with_costs(("narrow", "skip", "share"))
    shapes = measured.shapes
    assert {o.kind for o in measured.options} == {"narrow", "skip", "share"}
    for kinds in (("narrow",), ("skip",), ("share",), ("narrow", "skip", "share")):
        choices = measured.choices(kinds, 1)
        used = {option.kind for choice in choices for option in choice.key}
        assert used == {*kinds, "keep"}
        assert measured.choices(kinds, 1) is choices
        for choice in choices:
            blocks = shapes.blocks[choice.first : choice.last]
            assert choice.params == shapes.params(blocks) - sum(option.saved_params for option in choice.key)
            assert choice.cost == pytest.approx(sum(option.nats for option in choice.key))
            assert {option.group.blocks for option in choice.key} == {tuple(blocks)}
        for block in range(3):  # every block can stay as it is
            assert any((c.first, c.last, c.cost) == (block, block + 1, 0.0) for c in choices)


def test_no_choice_is_free_because_noise_measured_nothing() -> None:
    measured = with_costs(("skip",))
    free = Level(1, [0.0] * len(measured.options))
    choices = replace(measured, levels=[free]).choices(("skip",), 1)
    assert min(choice.cost for choice in choices if any(o.kind == "skip" for o in choice.key)) == pytest.approx(
        MIN_NATS
    )


def test_costs_are_those_of_a_student_of_the_size_asked_for() -> None:
    measured = with_costs(("narrow",))
    options = measured.options
    large, small = Level(400, [1.0] * len(options), joint=2.0), Level(100, [4.0] * len(options), joint=8.0)
    for params, expected in ((1e9, 2.0), (400, 2.0), (200, 8.0), (100, 32.0), (1, 32.0), (0, 32.0)):
        costs = [option.nats for option in replace(measured, levels=[large, small]).at(params)]
        assert costs == pytest.approx([expected] * len(options))
    assert [o.nats for o in replace(measured, levels=[small]).at(1e9)] == pytest.approx([32.0] * len(options))


def test_choices_of_another_size_are_not_those_of_the_cache() -> None:
    measured = with_costs(("narrow",))
    cheap, dear = (Level(params, [cost] * len(measured.options)) for params, cost in ((400, 1.0), (100, 2.0)))
    both = replace(measured, levels=[cheap, dear])
    costs = [max(choice.cost for choice in both.choices(("narrow",), params)) for params in (1000, 400, 200, 50, 1000)]
    assert costs == pytest.approx([3.0, 3.0, 3 * 2**0.5, 6.0, 3.0])
