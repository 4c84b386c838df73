"""Names of the stores, that is, of the ways in which a file holds weights; imports no torch."""

from __future__ import annotations

from typing import get_args

from vitcompress.recipe.student import StoreName

__all__ = ["STORE_NAMES", "StoreName"]

STORE_NAMES: tuple[StoreName, ...] = get_args(StoreName)
