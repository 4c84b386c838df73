"""Which options together cost least within a budget?  Exactly, by dynamic programming over consecutive groups.

    best[j][b] = min over i < j and the ways of making blocks i … j−1 as one group of  best[i][b − params] + cost

Costs are taken to add up, which they nearly do while they are small.
"""

from __future__ import annotations

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


def allocate(choices: Sequence[Choice], num_blocks: int, budget: int) -> tuple[list[Choice], float] | None:
    """The choices, in order of blocks, that cover every block once, fit the budget and cost least; and their cost.

    Parameters are rounded up to 1/4000 of the budget per choice, so the sum never exceeds it.

    Args:
        choices: of every run of blocks that could be a group.
        num_blocks: how many there are.
        budget: parameters.

    Returns:
        None where nothing fits.
    """
    if budget < num_blocks:
        return None
    unit = budget / BUCKETS
    best = np.full((num_blocks + 1, BUCKETS + 1), np.inf)
    best[0, :] = 0.0
    picked = np.full((num_blocks + 1, BUCKETS + 1), -1, dtype=np.int64)
    by_end: Mapping[int, list[int]] = {j: [] for j in range(num_blocks + 1)}
    for number, choice in enumerate(choices):
        by_end[choice.last].append(number)
    for end in range(1, num_blocks + 1):
        for number in by_end[end]:
            choice = choices[number]
            need = int(np.ceil(choice.params / unit))
            if need > BUCKETS:
                continue
            cost = best[choice.first, : BUCKETS + 1 - need] + choice.cost
            better = cost < best[end, need:]
            best[end, need:][better] = cost[better]
            picked[end, need:][better] = number
    if not np.isfinite(best[num_blocks, BUCKETS]):
        return None
    chosen: list[Choice] = []
    end, left = num_blocks, BUCKETS
    while end:
        choice = choices[picked[end, left]]
        chosen.append(choice)
        end, left = choice.first, left - int(np.ceil(choice.params / unit))
    return chosen[::-1], float(best[num_blocks, BUCKETS])


def frontier(choices: Sequence[Choice], most: int = 200) -> list[Choice]:
    """The choices of one run that no other beats in both parameters and cost; at most `most`, evenly spread."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.params, c.cost)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    if len(kept) <= most:
        return kept
    return [kept[round(i * (len(kept) - 1) / (most - 1))] for i in range(most)]
