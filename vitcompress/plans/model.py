"""Define `Plan`, `Group` and `Size`: plans as data; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from vitcompress.families.widths import Widths
from vitcompress.plans.bounds import MAX_BLOCKS, MAX_ENTRIES, Block, Integer, Positive, PositiveCount, Text, Texts


@dataclass(frozen=True)
class Group:
    """Blocks of one stage with the same structure, and what they share.

    Attributes:
        blocks: full names, in the order in which they run; the first is the donor.
        shared: names, inside a block, of the parameters that all blocks use.
        ranks: rank of each layer that has factors, by its name inside a block. If the layer's
            weight is in `shared`, the factors are added to it; otherwise they replace it.
        bases: layers in `ranks` whose factor on the side of the residual stream is shared by the
            group. The other factor, and both factors of other layers, belong to each block.
        widths: widths of the MLP and the heads.
        skipped: parts that are left out, `attn` or `mlp`; a constant takes their place.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    blocks: Annotated[tuple[Block, ...], Field(min_length=1, max_length=MAX_BLOCKS)]
    shared: Texts
    ranks: Annotated[Mapping[Text, PositiveCount], Field(max_length=MAX_ENTRIES)] = field(default_factory=dict)
    bases: Texts = ()
    widths: Widths = field(default_factory=Widths)
    skipped: Annotated[tuple[Literal["attn", "mlp"], ...], Field(max_length=2)] = ()

    @property
    def donor(self) -> str:
        """First block, under whose name shared parameters are stored."""
        return self.blocks[0]

    def whole(self, layer: str) -> bool:
        """Return whether `layer` has a whole matrix, its own or a shared one."""
        return layer not in self.ranks or f"{layer}.weight" in self.shared

    @property
    def is_plain(self) -> bool:
        """Whether the blocks differ from the source's by sharing alone."""
        return not self.ranks and self.widths == Widths() and not self.skipped

    def transforms(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the transformations, of those named, whose part the blocks have."""
        return tuple(name for name in names if ("mlp" if name == "mlp" else "attn") not in self.skipped)


@dataclass(frozen=True)
class Size:
    """Parameters, bytes and multiply-accumulates of the source (`teacher_…`) and the student.

    Bytes count parameters and persistent buffers, each shared tensor once: the source's in the data
    type they have in memory, the student's as the file stores them. The file's header, a few
    kilobytes, is not included. Multiply-accumulates are those of one image; None if not counted.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    teacher_params: PositiveCount
    student_params: PositiveCount
    params_ratio: Positive
    teacher_bytes: PositiveCount
    student_bytes: PositiveCount
    bytes_ratio: Positive
    teacher_macs: PositiveCount | None = None
    student_macs: PositiveCount | None = None
    macs_ratio: Positive | None = None


@dataclass(frozen=True)
class Plan:
    """What the blocks of a model share and what is added to them.

    Attributes:
        family: name of the model's family.
        groups: groups that together hold every block once, ordered by their first blocks.
        transforms: names of the transformations of every block.
        token_kernel: kernel size of the token convolution, in patches.
        size: parameters and bytes before and after and, once the student has been built,
            multiply-accumulates.
        why: the alternatives that a search chose from, one line each; empty if the plan was given.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    family: Text
    groups: tuple[Group, ...]
    transforms: Texts
    token_kernel: Integer
    size: Size
    why: Texts = ()

    @property
    def matrices(self) -> frozenset[str]:
        """Full names of the whole matrices that several blocks share, under their donors."""
        layers = (
            (group, name.removesuffix(".weight"))
            for group in self.groups
            if len(group.blocks) > 1
            for name in group.shared
            if name.endswith(".weight")
        )
        return frozenset(f"{g.donor}.{layer}.{'base' if layer in g.ranks else 'weight'}" for g, layer in layers)
