"""Which blocks share with which?  A box for each block, in the order in which they run, marked with its group."""

from __future__ import annotations

from typing import NamedTuple

from vitcompress.plans.model import Group
from vitcompress.report.model import Report

_NUM_COLOURS = 8


class Box(NamedTuple):
    """A block in the picture.

    Attributes:
        block: its number inside its stage.
        group: the name of its group: A, B, …; empty where it shares with none.
        colour: number of the group's colour; the letter says the same to those who cannot see it.
        donor: the group's weights are stored under its name.
    """

    block: int
    group: str
    colour: int
    donor: bool


def groups_of(report: Report) -> tuple[Group, ...]:
    """The groups of a report; of one from before they were told in full, runs of blocks."""
    if report.made_of:
        return report.made_of
    found, first = [], 0
    for count in report.groups:
        found.append(Group(tuple(f"blocks.{number}" for number in range(first, first + count)), ()))
        first += count
    return tuple(found)


def letters(groups: tuple[Group, ...]) -> list[str]:
    """The name of each group; empty for one of a single block."""
    found, number = [], 0
    for group in groups:
        found.append(_letter(number) if len(group.blocks) > 1 else "")
        number += len(group.blocks) > 1
    return found


def _letter(number: int) -> str:
    """A, B, …, Z, AA, AB, …"""
    name = ""
    while number >= 0:
        number, rest = divmod(number, 26)
        name, number = chr(ord("A") + rest) + name, number - 1
    return name


def boxes(report: Report) -> list[list[Box]]:
    """All blocks, in the order in which they run: a list for each stage."""
    groups = groups_of(report)
    names = letters(groups)
    shown = [name for name in names if name]
    home = {block: (name, group) for name, group in zip(names, groups, strict=True) for block in group.blocks}
    stages: dict[str, list[Box]] = {}
    for block in sorted(home, key=_place):
        name, group = home[block]
        colour = shown.index(name) % _NUM_COLOURS if name else 0
        box = Box(_place(block)[-1], name, colour, bool(name) and block == group.donor)
        stages.setdefault(block.rpartition(".")[0], []).append(box)
    return list(stages.values())


def _place(block: str) -> tuple[int, ...]:
    """Where a block runs: the numbers in its name, `layers.2.blocks.11`, in order."""
    return tuple(int(part) for part in block.split(".") if part.isdecimal()) or (0,)


def in_words(report: Report) -> str:
    """What the picture shows, as a sentence."""
    groups = groups_of(report)
    parts = [
        f"group {name}: {', '.join(block.removeprefix('blocks.') for block in group.blocks)}"
        for name, group in zip(letters(groups), groups, strict=True)
        if name
    ]
    return f"Blocks that share one set of weights: {'; '.join(parts)}." if parts else "No block shares with another."
