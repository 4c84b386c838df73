"""What does a format have to say of itself?  How it is written, when it cannot be, and where it is put."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from vitcompress.artifact.atomic import replacing
from vitcompress.export.parity import EXACT, Run, Tolerance
from vitcompress.export.subject import Subject

SLACK = 1.05  # that a file may be larger than the numbers in it
STRUCTURE_BYTES = 48_000  # per block, that the description of a graph may take


@dataclass(frozen=True)
class Written:
    """What was written, read back.

    Attributes:
        run: images `[B, C, H, W]` to outputs, computed from the file.
        tensor_bytes: of the numbers in it.
        limit_bytes: the most that the file may take.
        notes: what a user should know of it.
        tolerance: of its outputs.
    """

    run: Run
    tensor_bytes: int
    limit_bytes: int
    notes: tuple[str, ...] = ()
    tolerance: Tolerance = EXACT


@dataclass(frozen=True)
class Format:
    """A kind of file that an artifact can become.

    Attributes:
        write: `(subject, path)`; writes the file and reads it back.
        suffix: of the file; empty for a folder.
        extra: the extra of vitcompress that it imports packages of; empty for none.
        check: `(subject)`; raises a `VitcompressError` where the artifact cannot become such a file.
        placing: `(out)`; gives a place to write to, and moves what is there over `out` once all is well.
    """

    write: Callable[[Subject, Path], Written]
    suffix: str
    extra: str = ""
    check: Callable[[Subject], None] = field(default=lambda subject: None)
    placing: Callable[[Path], AbstractContextManager[Path]] = replacing


def limit_of(subject: Subject, tensor_bytes: int) -> int:
    """The most bytes that a file of a graph may take.

    Args:
        subject: tells the number of blocks.
        tensor_bytes: of the numbers that belong into it, each shared one once.
    """
    blocks = sum(len(group.blocks) for group in subject.manifest.plan.groups)
    return int(SLACK * tensor_bytes) + STRUCTURE_BYTES * blocks
