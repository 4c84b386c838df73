"""Widths of a block's MLP and heads, as data."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Width = Annotated[int, Field(ge=1, le=10**15)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Widths:
    """Widths of a block; None where the teacher's stays.

    Attributes:
        hidden: neurons of the MLP.
        qk: channels of queries and keys, per head.
        v: channels of values, per head.
    """

    hidden: Width | None = None
    qk: Width | None = None
    v: Width | None = None
