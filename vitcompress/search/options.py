"""What could be done to a part of some blocks?  Every way of making it smaller that the search weighs.

A part is the attention or the MLP. Options of both parts of the same blocks go together into one `Group`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitcompress.families.base import Family
from vitcompress.families.narrow import full_widths
from vitcompress.families.widths import Widths
from vitcompress.plans.make import layer_shapes
from vitcompress.plans.model import Group
from vitcompress.plans.sizes import group_params

PARTS = ("attn", "mlp")
WIDTH_SHARES = {
    "hidden": (0.85, 0.55, 0.28, 0.1, 0.03),
    "qk": (0.6, 0.3, 0.12, 0.05),
    "v": (0.85, 0.55, 0.28, 0.1, 0.03),
}
RANK_SHARES = (
    0.7,
    0.45,
    0.2,
    0.07,
    0.02,
)  # of the smaller side; above a half, only factors of oblong matrices save anything
ADAPTER_SHARE = 0.2  # beside a whole matrix, more is better spent on others
RUN_LENGTHS = (2, 3, 4, 6, 12, 24, 48)


@dataclass(frozen=True)
class Option:
    """One way of making one part of some consecutive blocks.

    Attributes:
        kind: one of `KINDS`, or "keep".
        group: the blocks, made like this; the other part of them as in the teacher.
        saved_params: what the part stores less than the teacher's, of all its blocks.
        cost: what it does to the teacher, in nats of KL per image; nan until measured.
        dial: what makes options of one kind different, in order: a rank, or a width.
    """

    kind: str
    group: Group
    saved_params: int
    cost: float = float("nan")
    dial: int = 0

    @property
    def part(self) -> str:
        """Attention or MLP: the one that the group has otherwise; empty where there is none."""
        if self.group.widths != Widths():
            return "mlp" if self.group.widths.hidden else "attn"
        names = [*self.group.shared, *self.group.ranks]
        return names[0].split(".")[0] if names else ""

    def row(self) -> dict[str, Any]:
        """What was measured, as plain JSON values."""
        widths = self.group.widths
        of = [name for name in ("hidden", "qk", "v") if getattr(widths, name)]
        kind = f"{self.kind} {of[0]}" if of else self.kind
        return {
            "kind": kind, "blocks": list(self.group.blocks), "part": self.part, "dial": self.dial,
            "saved_params": self.saved_params, "cost": self.cost,
        }  # fmt: skip


def merge(attention: Option, mlp: Option) -> Group:
    """The group whose attention is made one way and whose MLP another.

    Args:
        attention: of some blocks.
        mlp: of the same blocks.
    """
    a, m = attention.group, mlp.group
    return Group(
        a.blocks, a.shared + m.shared, {**a.ranks, **m.ranks}, a.bases + m.bases,
        Widths(m.widths.hidden, a.widths.qk, a.widths.v),
    )  # fmt: skip


@dataclass(frozen=True)
class Shapes:
    """A model's blocks, as far as options depend on them.

    Attributes:
        model: the teacher, on any device; meta will do.
        family: of the model.
        blocks: in the order in which they run.
        kinds: the kinds of options to make.
    """

    model: nn.Module
    family: Family
    blocks: Sequence[str]
    kinds: Sequence[str]

    def layers(self, block: str, part: str) -> dict[str, tuple[int, int]]:
        """Shapes of the linear layers of a block's part, by their names inside the block."""
        found = layer_shapes(self.family, self.model.get_submodule(block))
        return {name: shape for name, shape in found.items() if name.split(".")[0] == part}

    def option(self, kind: str, blocks: Sequence[str], part: str, dial: int = 0, **made: Any) -> Option:
        """An option, with what it saves."""
        group = Group(tuple(blocks), **{"shared": (), **made})
        return Option(kind, group, self.params(blocks) - group_params(self.model, self.family, group), dial=dial)

    def runs(self) -> Iterator[tuple[str, ...]]:
        """Consecutive blocks that could share: of one stage, with the same shapes, as many as divide usual depths."""
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
        """Parameters that the teacher has in some blocks."""
        return sum(p.numel() for block in blocks for p in self.model.get_submodule(block).parameters())

    def keep(self, blocks: Sequence[str], part: str) -> Option:
        """Leave a part alone."""
        return Option("keep", Group(tuple(blocks), ()), 0, 0.0)


def single_options(shapes: Shapes, block: str) -> Iterator[tuple[str, Option]]:
    """Options of one block alone, each with the name of the scale that it is a mark of: `attn.v`, `mlp.hidden`, …"""
    full = full_widths(shapes.model.get_submodule(block), shapes.family.narrow_attention)
    if "narrow" in shapes.kinds:
        for scale, shares in WIDTH_SHARES.items():
            width = getattr(full, scale)
            for share in shares if width else ():
                count = max(1, round(share * width))
                part = "mlp" if scale == "hidden" else "attn"
                yield f"{part}.{scale}", shapes.option("narrow", [block], part, count, widths=Widths(**{scale: count}))
    for part in PARTS if "low_rank" in shapes.kinds else ():
        layers = shapes.layers(block, part)
        for share in RANK_SHARES if layers else ():
            rank = max(1, round(share * min(map(min, layers.values()))))
            option = shapes.option("low_rank", [block], part, rank, ranks=dict.fromkeys(layers, rank))
            if option.saved_params > 0:
                yield f"{part}.rank", option


def run_options(shapes: Shapes) -> Iterator[Option]:
    """Options of several blocks together."""
    for blocks in shapes.runs():
        for part in PARTS:
            layers = shapes.layers(blocks[0], part)
            shared = tuple(f"{layer}.weight" for layer in layers)
            if not layers:
                continue
            if "share" in shapes.kinds:
                yield shapes.option("share", blocks, part, shared=shared)
            if len(blocks) not in _long_runs(shapes, blocks[0]):
                continue
            smallest = min(map(min, layers.values()))
            for share in RANK_SHARES:
                dial = max(1, round(share * smallest))
                ranks = dict.fromkeys(layers, dial)
                if "basis" in shapes.kinds:
                    option = shapes.option("basis", blocks, part, dial, ranks=ranks, bases=tuple(layers))
                    if option.saved_params > 0:
                        yield option
                if "adapter" in shapes.kinds and share <= ADAPTER_SHARE:
                    yield shapes.option("adapter", blocks, part, dial, ranks=ranks, shared=shared)


def _long_runs(shapes: Shapes, block: str) -> set[int]:
    """Lengths of the runs that are worth factors: all blocks of a stage, and half of them."""
    depth = sum(shapes.family.stage(other) == shapes.family.stage(block) for other in shapes.blocks)
    return {depth, depth // 2} - {0, 1}
