"""Find the choices that cost least within a budget, exactly, by dynamic programming.

    best[j][b] = min over i < j and the choices for blocks i … j−1 of  best[i][b − params] + cost

where b is the number of parameters used. Costs are assumed to add up, which nearly holds while they
are small. What is counted is not the parameters of a choice but how many more they are than on the
path with the fewest: that path fits whenever anything does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

BUCKETS = 4000

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """One way of making a run of consecutive blocks as one group.

    Attributes:
        first: number of the first block.
        last: number of the block after the last.
        params: parameters of the run.
        cost: nats per image.
        key: what the caller recognizes the choice by.
    """

    first: int
    last: int
    params: int
    cost: float
    key: Any


def allocate(
    choices: Sequence[Choice], num_blocks: int, budget: int, min_params: int = 0
) -> tuple[list[Choice], float] | None:
    """Return the choices that cover every block once, fit the budget and cost least.

    The parameters of a choice beyond the fewest possible are rounded up to 1/4000 of what the
    budget leaves for them. So the sum never exceeds the budget; where the budget leaves at most
    4000 parameters, nothing is rounded.

    Args:
        choices: for every run of blocks that could be a group.
        num_blocks: number of blocks.
        budget: maximum number of parameters.
        min_params: the sum has at least so many parameters, where that is possible.

    Returns:
        The choices in the order of their blocks, and their cost; None where nothing fits.
    """
    fewest = fewest_params(choices, num_blocks)
    if fewest[num_blocks] > budget:
        return None
    spare = budget - fewest[num_blocks]
    buckets = min(BUCKETS, int(spare))
    unit = spare / buckets if buckets else 1.0
    choices = [choice for choice in choices if math.isfinite(fewest[choice.first])]
    needs = [math.ceil((fewest[choice.first] + choice.params - fewest[choice.last]) / unit) for choice in choices]
    best, picked = _fill(choices, needs, num_blocks, buckets)
    rounding = num_blocks if unit > 1 else 0  # each choice counts as up to one bucket more than it has
    lowest = min(buckets, max(0, math.ceil((min_params - fewest[num_blocks]) / unit) + rounding))
    if not np.isfinite(best[num_blocks, lowest:]).any():
        lowest = 0
    left = used = buckets - int(best[num_blocks, lowest:][::-1].argmin())  # at equal cost, the most parameters
    chosen: list[Choice] = []
    end = num_blocks
    while end:
        number = int(picked[end, left])
        chosen.append(choices[number])
        end, left = choices[number].first, left - needs[number]
    return chosen[::-1], float(best[num_blocks, used])


def _fill(
    choices: Sequence[Choice], needs: Sequence[int], num_blocks: int, buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest cost of the blocks before `end`, and the last choice there, `[end, buckets used]`."""
    best = np.full((num_blocks + 1, buckets + 1), np.inf)
    best[0, 0] = 0.0
    picked = np.full((num_blocks + 1, buckets + 1), -1, dtype=np.int64)
    for number in sorted(range(len(choices)), key=lambda number: choices[number].last):
        choice, need = choices[number], needs[number]
        if need > buckets:
            continue
        cost = best[choice.first, : buckets + 1 - need] + choice.cost
        better = cost < best[choice.last, need:]
        best[choice.last, need:][better] = cost[better]
        picked[choice.last, need:][better] = number
    return best, picked


def fewest_params(choices: Sequence[Choice], num_blocks: int) -> list[float]:
    """Return the fewest parameters of blocks 0 … j−1, for each j; infinity where not covered."""
    fewest = [0.0] + [math.inf] * num_blocks
    for choice in sorted(choices, key=lambda c: c.last):
        fewest[choice.last] = min(fewest[choice.last], fewest[choice.first] + choice.params)
    return fewest


def undominated(items: Iterable[T], key: Callable[[T], tuple[float, float]]) -> list[T]:
    """Return the items that no other item beats in both numbers of `key`, ordered by the first."""
    kept: list[T] = []
    for item in sorted(items, key=key):
        if not kept or key(item)[1] < key(kept[-1])[1]:
            kept.append(item)
    return kept


def frontier(choices: Iterable[Choice], max_choices: int = 2000) -> list[Choice]:
    """Return the choices of one run that no other choice beats in both parameters and cost.

    Args:
        choices: all of the same run.
        max_choices: where more are left, evenly spread ones are returned.
    """
    kept = undominated(choices, lambda choice: (choice.params, choice.cost))
    if len(kept) <= max_choices:
        return kept
    return [kept[round(i * (len(kept) - 1) / (max_choices - 1))] for i in range(max_choices)]
