"""Write a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitcompress.errors import ArtifactError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write beside `path`, then move over it: a whole new file or the old one, never a part.

    Yields:
        Where to write; removed if the block fails.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot write there: {error.strerror}.") from error
    beside = Path(name)
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # mkstemp's own mode keeps everybody else out
        _flush(beside)
        os.replace(beside, path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file is on its disk: some file systems say only now that it is full."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
