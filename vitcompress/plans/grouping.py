"""Which blocks are a group?  Runs of `--share` blocks, blocks taken in turn, or the groups that were named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vitcompress.errors import PlanError, raise_faults
from vitcompress.recipe import DEFAULT_SHARE, PlanRecipe


@dataclass(frozen=True)
class Kind:
    """What two blocks must have in common to share: their stage, and the shapes of what they share, by name."""

    stage: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


def group_blocks(recipe: PlanRecipe, kinds: Mapping[str, Kind]) -> list[tuple[str, ...]]:
    """Put every block in one group.

    Args:
        recipe: groups asked for.
        kinds: of every block, in the order in which they run.

    Raises:
        PlanError: the groups asked for do not fit; every fault at once.
    """
    if recipe.groups is not None:
        return _explicit(recipe.groups, kinds)
    share = recipe.share if recipe.share is not None else DEFAULT_SHARE
    if not kinds:
        raise PlanError("The model has 0 blocks, so there is nothing to share.")
    if share > len(kinds):
        raise PlanError(f"--share {share}: the model has {len(kinds)} blocks.", hint=f"At most --share {len(kinds)}.")
    return _PATTERNS[recipe.pattern](share, kinds)


def _in_sequence(share: int, kinds: Mapping[str, Kind]) -> list[tuple[str, ...]]:
    """Cut the blocks into runs of `share`, all of one kind: the last run of a stage may be shorter."""
    chunks: list[tuple[str, ...]] = []
    for block, kind in kinds.items():
        if chunks and len(chunks[-1]) < share and kinds[chunks[-1][0]] == kind:
            chunks[-1] += (block,)
        else:
            chunks.append((block,))
    return chunks


def _in_turn(share: int, kinds: Mapping[str, Kind]) -> list[tuple[str, ...]]:
    """Deal each stage's blocks out to as many groups as runs of `share` would be: 0 1 0 1 0 1."""
    runs: list[list[str]] = []  # of one kind
    for block, kind in kinds.items():
        if runs and kinds[runs[-1][0]] == kind:
            runs[-1].append(block)
        else:
            runs.append([block])
    return [tuple(run[first :: -(-len(run) // share)]) for run in runs for first in range(-(-len(run) // share))]


_PATTERNS = {"sequence": _in_sequence, "cycle": _in_turn}


def _explicit(text: str, kinds: Mapping[str, Kind]) -> list[tuple[str, ...]]:
    """Read `0-3,4-7,8-11`: block numbers from zero, every block in one group, in order."""
    blocks = list(kinds)
    faults, expected = [], 0
    chunks: list[tuple[str, ...]] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if found is None:
            faults.append(f"{part.strip()!r} is not a block or a range like 0-3")
            continue
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            faults.append(f"{part.strip()} runs backwards")
            continue
        if first < expected:
            faults.append(f"{part.strip()} overlaps or comes after a later group (block {expected} is next)")
        elif first > expected:
            faults.append(f"{part.strip()} skips block {expected}")
        if last >= len(blocks):
            faults.append(f"{part.strip()} goes past the last block, {len(blocks) - 1}")
            last = len(blocks) - 1
        expected = max(expected, last + 1)
        chunks.append(tuple(blocks[first : last + 1]))
    if not faults and expected < len(blocks):
        faults.append(f"blocks {expected}-{len(blocks) - 1} are in no group")
    faults += [
        f"{chunk[0]} and {block} are in different stages"
        if kinds[chunk[0]].stage != kinds[block].stage
        else f"{chunk[0]} and {block} have matrices of different shapes"
        for chunk in chunks
        for block in [block for block in chunk if kinds[block] != kinds[chunk[0]]][:1]
    ]
    half, last = len(blocks) // 2, len(blocks) - 1
    hint = f"Name every block once, in order, for example --groups 0-{half - 1},{half}-{last}."
    raise_faults(PlanError, [(f"--groups {text}: {fault}.", hint) for fault in faults])
    return chunks
