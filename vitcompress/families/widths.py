"""Define `Widths`, the widths of a block's MLP and attention heads; imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Width = Annotated[int, Field(ge=1, le=10**15)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Widths:
    """Widths of a block; None keeps the source's width.

    Attributes:
        hidden: number of hidden neurons of the MLP.
        qk: number of channels of queries and keys, per head.
        v: number of channels of values, per head.
    """

    hidden: Width | None = None
    qk: Width | None = None
    v: Width | None = None
