"""Describe which blocks share weights: in words, as table rows, and as a map of boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice, product
from string import ascii_uppercase
from typing import NamedTuple

from vitcompress.plans.model import Group
from vitcompress.report.model import Report

_NUM_COLORS = 8

PARTS = {"attn": "attention", "mlp": "MLP"}
"""What the parts of a block are called."""


class Box(NamedTuple):
    """A block on the map.

    Attributes:
        block: its number inside its stage.
        group: name of its group: A, B, …; empty if it shares with no other block.
        colour: number of the group's color; the letter says the same without color.
        is_donor: the group's weights are stored under this block's name.
    """

    block: int
    group: str
    colour: int
    is_donor: bool


def describe_sharing(sizes: Sequence[int], groups: Sequence[Group] = ()) -> str:
    """Describe the groups in a few words: `12 blocks in groups of 5+5+2`.

    Args:
        sizes: number of blocks in each group.
        groups: the groups, where they are known; they tell whether groups alternate.
    """
    numbers = [[int(block.rpartition(".")[2]) for block in group.blocks] for group in groups]
    alternate = any(blocks[-1] - blocks[0] >= len(blocks) for blocks in numbers)
    return _describe_sizes(sizes) + (", taken in turn" if alternate else "")


def _describe_sizes(sizes: Sequence[int]) -> str:
    if len(sizes) == 1:
        return f"{sizes[0]} blocks in one group"
    if set(sizes) == {1}:
        return f"{len(sizes)} blocks that share nothing"
    if len(set(sizes)) == 1:
        return f"{sum(sizes)} blocks in {len(sizes)} groups of {sizes[0]}"
    return f"{sum(sizes)} blocks in groups of {'+'.join(map(str, sizes))}"


def describe_layers(group: Group) -> str:
    """Describe skipped parts, widths and ranks of a group in a few words; empty without any."""
    names = {"qk": "query/key", "v": "value"}
    heads = [f"{words} {width}" for name, words in names.items() if (width := getattr(group.widths, name))]
    widths = [f"MLP {group.widths.hidden}"] if group.widths.hidden else []
    widths += [f"{' and '.join(heads)} per head"] if heads else []
    ranks: dict[str, list[str]] = {}
    for layer, rank in group.ranks.items():
        kind = "basis of rank" if layer in group.bases else "rank"
        ranks.setdefault(f"{'plus ' if group.whole(layer) else ''}{kind} {rank}", []).append(layer)
    factors = [f"{', '.join(layers)}: {rank}" for rank, layers in ranks.items()]
    return ", ".join([*[f"no {PARTS[part]}" for part in group.skipped], *widths, *factors])


def shared_names(group: Group) -> list[str]:
    """Return the names, inside a block, of what a group shares; a basis is one of two factors."""
    return [*group.shared, *(f"{layer} (basis)" for layer in group.bases)]


def group_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Return a row for each group: name, blocks, what they share, and what is changed."""
    return [
        (name or "–", _short_blocks(group), ", ".join(shared_names(group)) if name else "", describe_layers(group))
        for name, group in _named_groups(report)
    ]


def boxes(report: Report) -> list[list[Box]]:
    """Return a box for each block in the order in which they run, a list for each stage."""
    groups = _named_groups(report)
    colors = {name: number % _NUM_COLORS for number, name in enumerate(name for name, _ in groups if name)}
    homes = {block: (name, group) for name, group in groups for block in group.blocks}
    stages: dict[str, list[Box]] = {}
    for block in sorted(homes, key=_block_numbers):
        name, group = homes[block]
        box = Box(_block_numbers(block)[-1], name, colors.get(name, 0), bool(name) and block == group.donor)
        stages.setdefault(block.rpartition(".")[0], []).append(box)
    return list(stages.values())


def describe_boxes(report: Report) -> str:
    """Describe the map in a sentence."""
    parts = [f"group {name}: {_short_blocks(group)}" for name, group in _named_groups(report) if name]
    return f"Blocks that share one set of weights: {'; '.join(parts)}." if parts else "No block shares with another."


def _named_groups(report: Report) -> list[tuple[str, Group]]:
    """Return the groups, named A, B, …, Z, AA, …; a group of one block has an empty name.

    An older report has only the sizes of its groups: they are groups of consecutive blocks.
    """
    blocks = (f"blocks.{number}" for number in count())
    groups = report.made_of or [Group(tuple(islice(blocks, size)), ()) for size in report.groups]
    names = _letters()
    return [(next(names) if len(group.blocks) > 1 else "", group) for group in groups]


def _letters() -> Iterator[str]:
    """Yield A, B, …, Z, AA, AB, …"""
    for length in count(1):
        yield from map("".join, product(ascii_uppercase, repeat=length))


def _short_blocks(group: Group) -> str:
    return ", ".join(block.removeprefix("blocks.") for block in group.blocks)


def _block_numbers(block: str) -> tuple[int, ...]:
    """Return the numbers in a block's name: `layers.2.blocks.11` gives (2, 11)."""
    return tuple(int(part) for part in block.split(".") if part.isdecimal()) or (0,)
