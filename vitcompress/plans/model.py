"""A plan as data: groups of blocks, what each shares, and what its layers are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import ConfigDict, Field

from vitcompress.families.widths import Widths
from vitcompress.plans.bounds import MAX_BLOCKS, MAX_ENTRIES, Block, Integer, Positive, PositiveCount, Text, Texts


@dataclass(frozen=True)
class Group:
    """Blocks of one stage that are made alike, and what they share.

    Attributes:
        blocks: full names, in the order in which they run; the first is the donor.
        shared: names, inside a block, of the parameters that all of them use.
        ranks: rank of the layers that have factors, by their names inside a block. Where the layer's weight is in
            `shared`, the factors are added to it; else they stand alone.
        bases: the layers in `ranks` whose factor on the side of the residual stream is the group's; the other factor,
            and both of a layer not named here, are the block's own.
        widths: of its MLP and heads.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    blocks: Annotated[tuple[Block, ...], Field(min_length=1, max_length=MAX_BLOCKS)]
    shared: Texts
    ranks: Annotated[Mapping[Text, PositiveCount], Field(max_length=MAX_ENTRIES)] = field(default_factory=dict)
    bases: Texts = ()
    widths: Widths = field(default_factory=Widths)

    @property
    def donor(self) -> str:
        """The block whose names the shared parameters are stored under."""
        return self.blocks[0]

    def whole(self, layer: str) -> bool:
        """Whether `layer` has a whole matrix: its own, or one of the group."""
        return layer not in self.ranks or f"{layer}.weight" in self.shared

    @property
    def is_plain(self) -> bool:
        """Whether nothing about its blocks is other than the teacher's but that they share."""
        return not self.ranks and self.widths == Widths()


@dataclass(frozen=True)
class Size:
    """Parameters, bytes and multiply-accumulates of teacher and student.

    Bytes are those of parameters and persistent buffers, each shared tensor once: of the teacher in the type they are
    held in, of the student as its file stores them. The file adds a header of some kilobytes. Multiply-accumulates
    are those of one image; None: not counted.
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
    """What of a model is shared and what is added to it.

    Attributes:
        family: name of the model's family.
        groups: every block of the model, each in one group, by their first blocks.
        transforms: names of the transformations of every block.
        token_kernel: k of the token convolution, in patches.
        why: what a search chose it from, one line each; empty where it was given.
        size: parameters, bytes and, once the student has been built, multiply-accumulates before and after.
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
        """Full names of the whole matrices that groups of several blocks share, each under its donor's name."""
        names = (
            (
                group.donor,
                name.removesuffix(".weight"),
                ".base" if name.removesuffix(".weight") in group.ranks else ".weight",
            )
            for group in self.groups
            if len(group.blocks) > 1
            for name in group.shared
            if name.endswith(".weight")
        )
        return frozenset(f"{donor}.{layer}{leaf}" for donor, layer, leaf in names)
