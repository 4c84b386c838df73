"""List the options of a search: ways of making a part of some blocks smaller.

A part is the attention or the MLP. An option for the attention and one for the MLP of the same
blocks merge into one `Group`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitcompress.families.base import Family
from vitcompress.families.narrow import full_widths
from vitcompress.families.widths import Widths
from vitcompress.plans.make import layer_shapes, plan_of
from vitcompress.plans.model import Group, Plan
from vitcompress.plans.sizes import group_params

PARTS = ("attn", "mlp")
WIDTH_SHARES = {
    "hidden": (0.85, 0.55, 0.28, 0.1, 0.03),
    "qk": (0.6, 0.3, 0.12, 0.05),
    "v": (0.85, 0.55, 0.28, 0.1, 0.03),
}
# of the smaller side; above a half, only factors of oblong matrices save anything
RANK_SHARES = (0.7, 0.45, 0.2, 0.07, 0.02)
MAX_ADAPTER_SHARE = 0.2  # parameters beyond that are better spent elsewhere
RUN_LENGTHS = (2, 3, 4, 6, 12, 24, 48)


@dataclass(frozen=True)
class Option:
    """One way of making one part of some consecutive blocks.

    Attributes:
        kind: one of `KINDS`, or "keep".
        group: the blocks with this part changed, and the other part as in the teacher.
        saved_params: parameters that the part saves over all blocks.
        cost: KL from the teacher's predictions, nats per image; nan until measured.
        dial: rank or width, which distinguishes options of one kind.
    """

    kind: str
    group: Group
    saved_params: int
    cost: float = float("nan")
    dial: int = 0

    @property
    def part(self) -> str:
        """The part that differs from the teacher's, of `PARTS`; empty where neither does."""
        if self.group.widths != Widths():
            return "mlp" if self.group.widths.hidden else "attn"
        names = [*self.group.shared, *self.group.ranks]
        return names[0].split(".")[0] if names else ""

    def row(self) -> dict[str, Any]:
        """Return the option as plain JSON values."""
        widths = self.group.widths
        narrowed = [name for name in ("hidden", "qk", "v") if getattr(widths, name)]
        kind = f"{self.kind} {narrowed[0]}" if narrowed else self.kind
        return {
            "kind": kind, "blocks": list(self.group.blocks), "part": self.part, "dial": self.dial,
            "saved_params": self.saved_params, "cost": self.cost,
        }  # fmt: skip


def merge(attention: Option, mlp: Option) -> Group:
    """Merge an option for the attention and one for the MLP into one group.

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
    """The blocks of a teacher, and what options and plans depend on.

    Attributes:
        model: the teacher, on any device; the shapes need no weights.
        family: of the model.
        blocks: full names, in the order in which they run.
        kinds: the kinds of options to make.
        transforms: transformations of every block.
        token_kernel: size of the token convolution.
    """

    model: nn.Module
    family: Family
    blocks: Sequence[str]
    kinds: Sequence[str]
    transforms: tuple[str, ...]
    token_kernel: int

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

    def option(self, kind: str, blocks: Sequence[str], dial: int = 0, **fields: Any) -> Option:
        """Return an option and what it saves; `fields` are those of its `Group`."""
        group = Group(tuple(blocks), **{"shared": (), **fields})
        return Option(kind, group, self.params(blocks) - group_params(self.model, self.family, group), dial=dial)

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
        """Return the option that leaves a part of some blocks as it is."""
        return Option("keep", Group(tuple(blocks), ()), 0, 0.0)


def single_options(shapes: Shapes, block: str) -> Iterator[tuple[str, Option]]:
    """Yield the options of one block, each with the name of its scale: `attn.v`, `mlp.hidden`, …"""
    full = full_widths(shapes.model.get_submodule(block), shapes.family.narrow_attention)
    if "narrow" in shapes.kinds:
        for scale, shares in WIDTH_SHARES.items():
            width = getattr(full, scale)
            for share in shares if width else ():
                count = max(1, round(share * width))
                part = "mlp" if scale == "hidden" else "attn"
                yield f"{part}.{scale}", shapes.option("narrow", [block], count, widths=Widths(**{scale: count}))
    for part in PARTS if "low_rank" in shapes.kinds else ():
        layers = shapes.layers(block, part)
        for share in RANK_SHARES if layers else ():
            rank = max(1, round(share * min(map(min, layers.values()))))
            option = shapes.option("low_rank", [block], rank, ranks=dict.fromkeys(layers, rank))
            if option.saved_params > 0:
                yield f"{part}.rank", option


def run_options(shapes: Shapes) -> Iterator[Option]:
    """Yield the options of several consecutive blocks, in the order of their first blocks."""
    for blocks in shapes.runs():
        for part in PARTS:
            layers = shapes.layers(blocks[0], part)
            shared = tuple(f"{layer}.weight" for layer in layers)
            if not layers:
                continue
            if "share" in shapes.kinds:
                yield shapes.option("share", blocks, shared=shared)
            if len(blocks) not in _long_runs(shapes, blocks[0]):
                continue
            smallest = min(map(min, layers.values()))
            for share in RANK_SHARES:
                dial = max(1, round(share * smallest))
                ranks = dict.fromkeys(layers, dial)
                if "basis" in shapes.kinds:
                    option = shapes.option("basis", blocks, dial, ranks=ranks, bases=tuple(layers))
                    if option.saved_params > 0:
                        yield option
                if "adapter" in shapes.kinds and share <= MAX_ADAPTER_SHARE:
                    yield shapes.option("adapter", blocks, dial, ranks=ranks, shared=shared)


def _long_runs(shapes: Shapes, block: str) -> set[int]:
    """Lengths of runs for which factors are tried: all blocks of a stage, and half of them."""
    depth = sum(shapes.family.stage(other) == shapes.family.stage(block) for other in shapes.blocks)
    return {depth, depth // 2} - {0, 1}
