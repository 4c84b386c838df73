"""Define what an export format provides, and what formats share: tracing and limits of size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from vitcompress.artifact.atomic import replacing
from vitcompress.export.loaded import LoadedArtifact
from vitcompress.export.parity import EXACT, Run, Tolerance

SLACK = 1.05  # a file may be 5 % larger than its numbers
GRAPH_BYTES = 48_000  # per block, for the description of a graph


@dataclass(frozen=True)
class Written:
    """A file that was written and read back.

    Attributes:
        run: computes outputs from images `[B, C, H, W]` with the file.
        tensor_bytes: size of the numbers in the file.
        limit_bytes: maximum size of the file.
        notes: what a user of the file should know.
        tolerance: how far its outputs may differ from the artifact's.
    """

    run: Run
    tensor_bytes: int
    limit_bytes: int
    notes: tuple[str, ...] = ()
    tolerance: Tolerance = EXACT


@dataclass(frozen=True)
class Format:
    """A format that artifacts can be exported to.

    Attributes:
        write: `(artifact, path)`; writes the file and reads it back.
        suffix: suffix of the file; empty for a folder.
        extra: extra of vitcompress that installs what it imports; empty for none.
        check: `(artifact)`; raises a `VitcompressError` if the artifact does not suit the format.
        placing: `(out)`; yields a temporary path to write to, and moves the result to `out` if all
            goes well.
    """

    write: Callable[[LoadedArtifact, Path], Written]
    suffix: str
    extra: str = ""
    check: Callable[[LoadedArtifact], None] = field(default=lambda artifact: None)
    placing: Callable[[Path], AbstractContextManager[Path]] = replacing


def limit_of(artifact: LoadedArtifact, tensor_bytes: int) -> int:
    """Return the maximum size of a file with a graph, in bytes.

    Args:
        artifact: the artifact, for its number of blocks.
        tensor_bytes: size of the numbers that belong in the file, each shared one once.
    """
    num_blocks = sum(len(group.blocks) for group in artifact.manifest.plan.groups)
    return int(SLACK * tensor_bytes) + GRAPH_BYTES * num_blocks


def trace(student: nn.Module, input_size: tuple[int, int, int]) -> ExportedProgram:
    """Trace a model for batches of any size; a parameter that blocks share is traced once.

    Args:
        student: the model, in eval mode on CPU.
        input_size: channels, rows and columns of an image.
    """
    images = torch.zeros(2, *input_size)  # with one image, torch.export would fix the batch size
    with torch.no_grad():
        return torch.export.export(student, (images,), dynamic_shapes=({0: Dim("batch")},))
