"""Put blocks into groups: runs of `--share` blocks, a cycle, or the groups in `--groups`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vitcompress.errors import PlanError, raise_faults
from vitcompress.recipe import DEFAULT_SHARE, PlanRecipe


@dataclass(frozen=True)
class BlockKind:
    """What two blocks must have in common to share.

    Attributes:
        stage: stage of the block.
        shapes: name, inside the block, and shape of each parameter that a group shares.
    """

    stage: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


def group_blocks(recipe: PlanRecipe, kinds: Mapping[str, BlockKind]) -> list[tuple[str, ...]]:
    """Put every block into one group.

    Args:
        recipe: `groups`, or else `share` and `pattern`.
        kinds: kind of every block, in the order in which they run.

    Returns:
        Names of the blocks of each group.

    Raises:
        PlanError: the requested groups do not fit the model; lists every fault.
    """
    if recipe.groups is not None:
        return _parse_groups(recipe.groups, kinds)
    unasked = 1 if recipe.width is not None and recipe.pattern == "sequence" else DEFAULT_SHARE
    share = recipe.share if recipe.share is not None else unasked
    if not kinds:
        raise PlanError("The model has 0 blocks, so there is nothing to share.")
    if share > len(kinds):
        raise PlanError(
            f"--share {share}: the model has {len(kinds)} blocks.", hint=f"Use at most --share {len(kinds)}."
        )
    groups: list[tuple[str, ...]] = []
    for _, consecutive in itertools.groupby(kinds, key=kinds.__getitem__):  # blocks of one kind
        run = tuple(consecutive)
        num_groups = -(-len(run) // share)
        if recipe.pattern == "sequence":  # 0 0 0 1 1 1; the last group may be shorter
            groups += [run[number * share : (number + 1) * share] for number in range(num_groups)]
        else:  # cycle: 0 1 0 1 0 1
            groups += [run[number::num_groups] for number in range(num_groups)]
    return groups


def _parse_groups(text: str, kinds: Mapping[str, BlockKind]) -> list[tuple[str, ...]]:
    """Parse `0-3,4-7,8-11`: block numbers from zero, every block in one group, in order."""
    blocks = list(kinds)
    faults, expected = [], 0
    groups: list[tuple[str, ...]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            faults.append(f"{part.strip()!r} is not a block number or a range like 0-3")
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            faults.append(f"{part.strip()} runs backwards")
            continue
        if first < expected:
            faults.append(f"{part.strip()} overlaps an earlier group or is out of order (block {expected} is next)")
        elif first > expected:
            faults.append(f"{part.strip()} skips block {expected}")
        if last >= len(blocks):
            faults.append(f"{part.strip()} goes past the last block, {len(blocks) - 1}")
            last = len(blocks) - 1
        expected = max(expected, last + 1)
        groups.append(tuple(blocks[first : last + 1]))
    if not faults and expected < len(blocks):
        faults.append(f"blocks {expected}-{len(blocks) - 1} are in no group")
    faults += [fault for group in groups if (fault := _mixed_kinds(group, kinds))]
    half, last = len(blocks) // 2, len(blocks) - 1
    hint = f"Name every block once, in order, for example --groups 0-{half - 1},{half}-{last}."
    raise_faults(PlanError, [(f"--groups {text}: {fault}.", hint) for fault in faults])
    return groups


def _mixed_kinds(group: tuple[str, ...], kinds: Mapping[str, BlockKind]) -> str:
    """Return why the first unsuitable block is unsuitable; empty if all are suitable."""
    for block in group:
        if kinds[block].stage != kinds[group[0]].stage:
            return f"{group[0]} and {block} are in different stages"
        if kinds[block] != kinds[group[0]]:
            return f"{group[0]} and {block} have matrices of different shapes"
    return ""
