"""How does an artifact become a program that PyTorch runs without us?  By torch.export, each shared tensor once."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from vitcompress.artifact.load import load
from vitcompress.errors import ExportError
from vitcompress.export.formats import SLACK, Format, Written, limit_of
from vitcompress.export.program import trace
from vitcompress.export.subject import Subject

PROGRAM_BYTES = 3_000  # per step of the program, that its description may take
TABLES_BYTES = 20_000  # that constants may take which are computed while tracing


def write(subject: Subject, path: Path) -> Written:
    """Write a .pt2 file for batches of any size, and load it.

    Quantised matrices stay codes and scales, decoded by the program at each use; all else is as the model holds it.

    Args:
        subject: the artifact.
        path: the file to write.
    """
    student = load(subject.path, keep_quantized=True).requires_grad_(False)
    held = {id(t): t for t in (*student.parameters(), *student.buffers())}
    tensor_bytes = sum(t.numel() * t.element_size() for t in held.values())
    traced = trace(student, subject.input_size)
    traced.example_inputs = None  # images of zeros, which would go into the file
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # where in our files each step was written
    held_in_memory = io.BytesIO()  # given a path, torch would write its passing name into the file
    torch.export.save(traced, held_in_memory)
    path.write_bytes(held_in_memory.getbuffer())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.9 about its own reading
        program = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            outputs: Tensor = program(images)
        return outputs

    _check_tensors(path, tensor_bytes)
    return Written(run, tensor_bytes, limit_of(subject, tensor_bytes) + PROGRAM_BYTES * len(traced.graph.nodes))


def _check_tensors(path: Path, tensor_bytes: int) -> None:
    """Make sure that a file holds each tensor once, by the bytes of all.

    Raises:
        ExportError: it holds more.
    """
    with zipfile.ZipFile(path) as file:
        found = sum(info.file_size for info in file.infolist() if re.search(r"/(weight|tensor)_\d+$", info.filename))
    if found > SLACK * tensor_bytes + TABLES_BYTES:
        raise ExportError(
            f"its tensors have {found:,} bytes, the model's {tensor_bytes:,}: shared ones are there twice"
        )


PT2 = Format(write=write, suffix=".pt2")
