"""List the options of a search: ways of making a part of some blocks smaller.

A part is the attention or the MLP. Options of different parts or scales of the same blocks merge
into one `Group`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from vitcompress.families.base import Family
from vitcompress.families.narrow import full_widths
from vitcompress.families.skip import skippable
from vitcompress.families.widths import Widths
from vitcompress.plans.make import layer_shapes, plan_of
from vitcompress.plans.model import Group, Plan
from vitcompress.plans.sizes import group_params

PARTS = ("attn", "mlp")
MAX_WIDTHS = 32  # measured on each scale
MAX_RANKS = 12
# of the smaller side, for several blocks; above a half, only oblong matrices save anything
RANK_SHARES = (0.45, 0.2, 0.07, 0.02)
MAX_ADAPTER_SHARE = 0.2  # parameters beyond that are better spent elsewhere
RUN_LENGTHS = (2, 3, 4, 6, 12, 24, 48)
NEURONS_PER_CHANNEL = 2
"""Widths of MLPs are multiples of twice the number that widths of heads are multiples of."""


@dataclass(frozen=True)
class Option:
    """One way of making one part of some consecutive blocks.

    Attributes:
        kind: one of `KINDS`, or "keep".
        scale: the part and what is set in it: `attn.qk`, `mlp.hidden`, `attn.rank`, `mlp.share`, …
        group: the blocks with this part changed, and the other part as in the teacher.
        saved_params: parameters that the part saves over all blocks.
        dial: rank or width, which distinguishes options of one scale.
        nats: KL from the predictions that it changes, nats per image; nan until measured.
    """

    kind: str
    scale: str
    group: Group
    saved_params: int
    dial: int = 0
    nats: float = float("nan")

    @property
    def part(self) -> str:
        """The part that differs from the teacher's, of `PARTS`; empty where neither does."""
        return self.scale.partition(".")[0]

    def row(self) -> dict[str, Any]:
        """Return the option as plain JSON values."""
        return {
            "kind": self.kind, "scale": self.scale, "blocks": list(self.group.blocks), "dial": self.dial,
            "saved_params": self.saved_params, "nats": self.nats,
        }  # fmt: skip


def merge(options: Iterable[Option]) -> Group:
    """Merge options of the same blocks, each of another scale, into one group."""
    groups = [option.group for option in options]
    widths = [group.widths for group in groups]
    return Group(
        groups[0].blocks,
        tuple(name for group in groups for name in group.shared),
        {layer: rank for group in groups for layer, rank in group.ranks.items()},
        tuple(layer for group in groups for layer in group.bases),
        Widths(*(next((getattr(w, name) for w in widths if getattr(w, name)), None) for name in ("hidden", "qk", "v"))),
        tuple(part for group in groups for part in group.skipped),
    )  # fmt: skip


def aligned(full: int, multiple: int, max_count: int) -> list[int]:
    """Return widths below a full one to choose from, all multiples of the same number.

    Args:
        full: the teacher's width.
        multiple: the widths are multiples of it; of at most a quarter of `full`, so that there is
            something to choose from.
        max_count: maximum number of widths; small ones are closer together.
    """
    step = max(1, min(multiple, full // 4))
    count = (full - 1) // step
    if count <= max_count:
        return [step * number for number in range(1, count + 1)]
    numbers = np.linspace(1, np.sqrt(count), max_count) ** 2
    return [step * number for number in sorted({round(float(n)) for n in numbers})]


@dataclass(frozen=True)
class Shapes:
    """The blocks of a teacher, and what options and plans depend on.

    Attributes:
        model: the teacher, on any device; the shapes need no weights.
        family: of the model.
        blocks: full names, in the order in which they run.
        kinds: the kinds of options to make.
        transforms: transformations of every block.
        token_kernel: size of the token convolution.
        multiple: widths of heads and ranks are multiples of it; numbers of neurons of twice it.
    """

    model: nn.Module
    family: Family
    blocks: Sequence[str]
    kinds: Sequence[str]
    transforms: tuple[str, ...]
    token_kernel: int
    multiple: int = 8

    def plan(self, groups: Iterable[Group]) -> Plan:
        """Return the plan of groups that together hold every block once."""
        return plan_of(self.model, self.family, tuple(groups), self.transforms, self.token_kernel)

    def unchanged_plan(self) -> Plan:
        """Return the plan that leaves every block as it is and adds the transformations."""
        return self.plan(Group((block,), ()) for block in self.blocks)

    def layers(self, block: str, part: str) -> dict[str, tuple[int, int]]:
        """Return the shapes `[out, in]` of a part's linear layers, by name inside the block."""
        shapes = layer_shapes(self.family, self.model.get_submodule(block))
        return {name: shape for name, shape in shapes.items() if name.split(".")[0] == part}

    def option(self, kind: str, scale: str, blocks: Sequence[str], dial: int = 0, **fields: Any) -> Option:
        """Return an option and what it saves; `fields` are those of its `Group`."""
        group = Group(tuple(blocks), **{"shared": (), **fields})
        saved_params = self.params(blocks) - group_params(self.model, self.family, group)
        return Option(kind, scale, group, saved_params, dial)

    def runs(self) -> Iterator[tuple[str, ...]]:
        """Yield runs of alike blocks of one stage, of lengths that divide usual depths."""
        for first in range(len(self.blocks)):
            for last in range(first + 1, len(self.blocks)):
                if not self._alike(self.blocks[first], self.blocks[last]):
                    break
                if last + 1 - first in (*RUN_LENGTHS, *_long_runs(self, self.blocks[first])):
                    yield tuple(self.blocks[first : last + 1])

    def _alike(self, one: str, other: str) -> bool:
        a, b = ({n: p.shape for n, p in self.model.get_submodule(x).named_parameters()} for x in (one, other))
        return self.family.stage(one) == self.family.stage(other) and a == b

    def params(self, blocks: Sequence[str]) -> int:
        """Return the number of parameters that the teacher has in some blocks."""
        return sum(p.numel() for block in blocks for p in self.model.get_submodule(block).parameters())

    def keep(self, blocks: Sequence[str]) -> Option:
        """Return the option that leaves some blocks as they are."""
        return Option("keep", "", Group(tuple(blocks), ()), 0, nats=0.0)


def list_options(shapes: Shapes) -> list[Option]:
    """Return all options: of each block, then of several blocks."""
    singles = (option for block in shapes.blocks for option in single_options(shapes, block))
    return [*singles, *run_options(shapes)]


def single_options(shapes: Shapes, block: str) -> Iterator[Option]:
    """Yield the options of one block."""
    full = full_widths(shapes.model.get_submodule(block), shapes.family.narrow_attention)
    scales = {"mlp.hidden": NEURONS_PER_CHANNEL, "attn.qk": 1, "attn.v": 1} if "narrow" in shapes.kinds else {}
    for scale, factor in scales.items():
        name = scale.split(".")[1]
        width = getattr(full, name)
        for count in aligned(width, factor * shapes.multiple, MAX_WIDTHS) if width else ():
            yield shapes.option("narrow", scale, [block], count, widths=Widths(**{name: count}))
    for part in PARTS if "low_rank" in shapes.kinds else ():
        layers = shapes.layers(block, part)
        for rank in aligned(min(map(min, layers.values())), shapes.multiple, MAX_RANKS) if layers else ():
            option = shapes.option("low_rank", f"{part}.rank", [block], rank, ranks=dict.fromkeys(layers, rank))
            if option.saved_params > 0:
                yield option
    for part in skippable(shapes.model.get_submodule(block)) if "skip" in shapes.kinds else ():
        yield shapes.option("skip", f"{part}.skip", [block], skipped=(part,))


def run_options(shapes: Shapes) -> Iterator[Option]:
    """Yield the options of several consecutive blocks, in the order of their first blocks."""
    for blocks in shapes.runs():
        for part in PARTS:
            layers = shapes.layers(blocks[0], part)
            shared = tuple(f"{layer}.weight" for layer in layers)
            if not layers:
                continue
            if "share" in shapes.kinds:
                yield shapes.option("share", f"{part}.share", blocks, shared=shared)
            if not _has_factors(shapes, blocks):
                continue
            smallest = min(map(min, layers.values()))
            for share in RANK_SHARES:
                dial = max(1, round(share * smallest))
                ranks = dict.fromkeys(layers, dial)
                if "basis" in shapes.kinds:
                    option = shapes.option("basis", f"{part}.basis", blocks, dial, ranks=ranks, bases=tuple(layers))
                    if option.saved_params > 0:
                        yield option
                if "adapter" in shapes.kinds and share <= MAX_ADAPTER_SHARE:
                    yield shapes.option("adapter", f"{part}.adapter", blocks, dial, ranks=ranks, shared=shared)


def _has_factors(shapes: Shapes, blocks: Sequence[str]) -> bool:
    """Whether factors are tried for a run: all blocks of a stage, its first and its second half."""
    stage = [b for b in shapes.blocks if shapes.family.stage(b) == shapes.family.stage(blocks[0])]
    half = len(stage) // 2
    return list(blocks) in (stage, stage[:half], stage[half:])


def _long_runs(shapes: Shapes, block: str) -> set[int]:
    """Lengths of runs that are tried in any case: all blocks of a stage, and half of them."""
    depth = sum(shapes.family.stage(other) == shapes.family.stage(block) for other in shapes.blocks)
    return {depth, depth // 2, depth - depth // 2} - {0, 1}
