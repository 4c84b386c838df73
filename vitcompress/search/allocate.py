"""Which options together cost least within a budget?  Exactly, by dynamic programming over consecutive groups.

    best[j][b] = min over i < j and the ways of making blocks i … j−1 as one group of  best[i][b − params] + cost

where b is what is used. Costs are taken to add up, which they nearly do while they are small. What is counted is not
the parameters of a choice but how many more they are than on the way with the fewest: that way fits whenever anything
does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUCKETS = 4000


@dataclass(frozen=True)
class Choice:
    """One way of making a run of blocks as one group.

    Attributes:
        first: number of the first block.
        last: number of the block after the last.
        params: parameters of the run.
        cost: nats.
        key: what it is.
    """

    first: int
    last: int
    params: int
    cost: float
    key: Any


def allocate(
    choices: Sequence[Choice], num_blocks: int, budget: int, at_least: int = 0
) -> tuple[list[Choice], float] | None:
    """The choices, in order of blocks, that cover every block once, fit the budget and cost least; and their cost.

    What a choice has more than the fewest is rounded up to 1/4000 of what the budget leaves for that, so the sum never
    exceeds the budget; it is exact where that is no more than 4000 parameters.

    Args:
        choices: of every run of blocks that could be a group.
        num_blocks: how many there are.
        budget: parameters.
        at_least: parameters below which the sum does not fall, where there is such a way.

    Returns:
        None where nothing fits.
    """
    fewest = fewest_params(choices, num_blocks)
    if fewest[num_blocks] > budget:
        return None
    spare = budget - fewest[num_blocks]
    buckets = min(BUCKETS, int(spare))
    unit = spare / buckets if buckets else 1.0
    choices = [choice for choice in choices if math.isfinite(fewest[choice.first])]
    needs = [math.ceil((fewest[choice.first] + choice.params - fewest[choice.last]) / unit) for choice in choices]
    best = np.full((num_blocks + 1, buckets + 1), np.inf)
    best[0, 0] = 0.0
    picked = np.full((num_blocks + 1, buckets + 1), -1, dtype=np.int64)
    by_end: Mapping[int, list[int]] = {j: [] for j in range(num_blocks + 1)}
    for number, choice in enumerate(choices):
        by_end[choice.last].append(number)
    for end in range(1, num_blocks + 1):
        for number in by_end[end]:
            choice = choices[number]
            need = needs[number]
            if need > buckets:
                continue
            cost = best[choice.first, : buckets + 1 - need] + choice.cost
            better = cost < best[end, need:]
            best[end, need:][better] = cost[better]
            picked[end, need:][better] = number
    rounded = num_blocks if unit > 1 else 0  # a choice counts as up to a bucket more than it has
    lowest = min(buckets, max(0, math.ceil((at_least - fewest[num_blocks]) / unit) + rounded))
    if not np.isfinite(best[num_blocks, lowest:]).any():
        lowest = 0
    used = buckets - int(best[num_blocks, lowest:][::-1].argmin())  # of what costs the same, the one that keeps most
    chosen: list[Choice] = []
    end, left = num_blocks, used
    while end:
        number = int(picked[end, left])
        chosen.append(choices[number])
        end, left = choices[number].first, left - needs[number]
    return chosen[::-1], float(best[num_blocks, used])


def fewest_params(choices: Sequence[Choice], num_blocks: int) -> list[float]:
    """The fewest parameters that blocks 0 … j−1 can have, for each j; infinite where no choices cover them."""
    fewest = [0.0] + [math.inf] * num_blocks
    for choice in sorted(choices, key=lambda c: c.last):
        fewest[choice.last] = min(fewest[choice.last], fewest[choice.first] + choice.params)
    return fewest


def frontier(choices: Sequence[Choice], most: int = 2000) -> list[Choice]:
    """The choices of one run that no other beats in both parameters and cost; at most `most`, evenly spread."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.params, c.cost)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    if len(kept) <= most:
        return kept
    return [kept[round(i * (len(kept) - 1) / (most - 1))] for i in range(most)]
