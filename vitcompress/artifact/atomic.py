"""Write files atomically: the complete new file or the old one, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitcompress.errors import ArtifactError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary file beside `path`, then move it over `path`.

    Yields:
        Path of the temporary file; it is removed if the block fails.

    Raises:
        ArtifactError: the folder or the file cannot be written to.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot write there: {error.strerror}.") from error
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp lets nobody but the owner read the file
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises:
        ArtifactError: the folder or the file cannot be written to.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    """Wait until a file is on disk; some file systems report a full disk only now."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
