"""Types with bounds for the fields of plans and reports.

Anybody can write a file, so the bounds are checked when one is read. They are not checked when a
dataclass is built: a report at the end of a long training is never refused.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MAX_NUMBER = 10**15
MAX_BLOCKS = 512  # timm's deepest model has 60; each takes milliseconds to build, whatever its width
MAX_ENTRIES = 4096

Text = Annotated[str, Field(max_length=1 << 16)]
Texts = Annotated[tuple[Text, ...], Field(max_length=MAX_ENTRIES)]
Number = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=MAX_NUMBER, allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Points = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Integer = Annotated[int, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Count = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Block = Annotated[str, Field(pattern=r"^([A-Za-z0-9_]{1,64}\.){1,8}[0-9]{1,5}$")]
