"""The allocation finds what trying every combination finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from vitcompress.search.allocate import BUCKETS, Choice, allocate, frontier


def instance(seed: int, scale: int) -> tuple[list[Choice], int]:
    draw = random.Random(seed)
    num_blocks = draw.randint(2, 5)
    choices = [
        Choice(first, last, draw.randint(1, scale) * (last - first), draw.random() * (last - first), (first, last, n))
        for first in range(num_blocks)
        for last in range(first + 1, num_blocks + 1)
        for n in range(3 if last == first + 1 else draw.randint(0, 2))
    ]
    return choices, num_blocks


def covers(choices: Sequence[Choice], num_blocks: int) -> list[list[Choice]]:
    """Every way of covering the blocks."""

    def rest(start: int) -> list[list[Choice]]:
        if start == num_blocks:
            return [[]]
        return [[c, *more] for c in choices if c.first == start for more in rest(c.last)]

    return rest(0)


@pytest.mark.parametrize("seed", range(12))
def test_the_allocation_is_that_of_trying_everything(seed: int) -> None:
    choices, num_blocks = instance(seed, scale=100)
    every = [(sum(c.params for c in way), sum(c.cost for c in way)) for way in covers(choices, num_blocks)]
    least = min(params for params, _ in every)
    assert allocate(choices, num_blocks, least - 1) is None
    for budget in (least, least + 1, least + 37, 2 * least, 100 * num_blocks):
        found = allocate(choices, num_blocks, budget)
        assert found is not None
        chosen, cost = found
        assert [c.first for c in chosen] == [0, *(c.last for c in chosen[:-1])]
        assert chosen[-1].last == num_blocks
        assert sum(c.params for c in chosen) <= budget
        assert cost == pytest.approx(sum(c.cost for c in chosen))
        assert cost == pytest.approx(min(cost for params, cost in every if params <= budget))


@pytest.mark.parametrize("seed", range(12))
def test_no_more_is_saved_than_asked_for_where_that_can_be(seed: int) -> None:
    choices, num_blocks = instance(seed, scale=100)
    every = [(sum(c.params for c in way), sum(c.cost for c in way)) for way in covers(choices, num_blocks)]
    least, most = (pick(params for params, _ in every) for pick in (min, max))
    for budget, at_least in itertools.product((least, least + 37, most, 2 * most), (0, least + 30, most)):
        within = [cost for params, cost in every if at_least <= params <= budget]
        found = allocate(choices, num_blocks, budget, at_least)
        assert found is not None
        assert found[1] == pytest.approx(min(within or [cost for params, cost in every if params <= budget]))


@pytest.mark.parametrize("seed", range(6))
def test_large_budgets_are_kept_and_the_smallest_one_is_found(seed: int) -> None:
    choices, num_blocks = instance(seed, scale=10**7)
    every = [(sum(c.params for c in way), sum(c.cost for c in way)) for way in covers(choices, num_blocks)]
    least = min(params for params, _ in every)
    assert allocate(choices, num_blocks, least - 1) is None
    for budget in (least, round(1.3 * least), 3 * least):
        found = allocate(choices, num_blocks, budget)
        assert found is not None
        assert sum(c.params for c in found[0]) <= budget
        tighter = budget - num_blocks * (budget - least) / BUCKETS  # what rounding up may cost
        assert found[1] <= min(cost for params, cost in every if params <= tighter) + 1e-12


def test_nothing_to_choose_from_fits_nothing() -> None:
    assert allocate([], 2, 10**9) is None
    assert allocate([Choice(1, 2, 5, 0.0, None)], 2, 10**9) is None  # nothing covers the first block


def test_the_frontier_is_what_no_other_beats() -> None:
    draw = random.Random(0)
    every = [Choice(0, 1, draw.randint(1, 60), draw.randint(1, 60) / 10, n) for n in range(80)]
    kept = frontier(every)
    for choice in every:
        beaten = any(
            (o.params, o.cost) != (choice.params, choice.cost) and o.params <= choice.params and o.cost <= choice.cost
            for o in every
        )
        assert beaten == ((choice.params, choice.cost) not in {(o.params, o.cost) for o in kept})
    few = frontier(every, max_choices=3)
    assert few == [kept[0], kept[round((len(kept) - 1) / 2)], kept[-1]]
