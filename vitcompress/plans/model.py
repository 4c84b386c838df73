"""A plan as data: groups of blocks, what each shares, and what its layers are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from vitcompress.families.widths import Widths

_FROZEN = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FROZEN)
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

    blocks: Annotated[tuple[str, ...], Field(min_length=1)]
    shared: tuple[str, ...]
    ranks: Mapping[str, Annotated[int, Field(ge=1)]] = field(default_factory=dict)
    bases: tuple[str, ...] = ()
    widths: Widths = Widths()

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


@dataclass(frozen=True, config=_FROZEN)
class Size:
    """Parameters, bytes and multiply-accumulates of teacher and student.

    Bytes are those of parameters and persistent buffers, each shared tensor once: of the teacher in the type they are
    held in, of the student as its file stores them. The file adds a header of some kilobytes. Multiply-accumulates
    are those of one image; None: not counted.
    """

    teacher_params: int
    student_params: int
    params_ratio: float
    teacher_bytes: int
    student_bytes: int
    bytes_ratio: float
    teacher_macs: int | None = None
    student_macs: int | None = None
    macs_ratio: float | None = None


@dataclass(frozen=True, config=_FROZEN)
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

    family: str
    groups: tuple[Group, ...]
    transforms: tuple[str, ...]
    token_kernel: int
    size: Size
    why: tuple[str, ...] = ()

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
