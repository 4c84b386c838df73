"""Name the cache that cannot be written to, where a download or a data set failed of it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC}
_HOMES = {"HF_HOME": "~/.cache/huggingface", "TORCH_HOME": "~/.cache/torch"}  # with their defaults


def cache_hint(error: BaseException) -> str:
    """Return what to do where an error comes from a cache that cannot be written to; else nothing.

    Args:
        error: an error of a library that caches what it reads.
    """
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _UNWRITABLE:
            for variables, folder in _caches():
                if cause.filename is None or _is_below(os.fspath(cause.filename), folder):
                    return f"The cache {folder} cannot be written to: set {variables} to a folder with room for it."
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _caches() -> Iterator[tuple[str, str]]:
    """Yield the variables that name a cache, and its folder; the most special ones first."""
    for module, variable in (("datasets.config", "HF_DATASETS_CACHE"), ("huggingface_hub.constants", "HF_HUB_CACHE")):
        if module in sys.modules:  # otherwise the error is not of this package
            yield f"HF_HOME or {variable}", str(getattr(sys.modules[module], variable))
    for home, default in _HOMES.items():
        yield home, os.environ.get(home) or os.path.expanduser(default)


def _is_below(path: str, folder: str) -> bool:
    """Return whether a path is a folder, is in it, or is one of the folders that it is in."""
    where, cache = Path(path).absolute(), Path(folder).expanduser().absolute()
    return where.is_relative_to(cache) or cache.is_relative_to(where)
