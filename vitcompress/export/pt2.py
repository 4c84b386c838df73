"""How does an artifact become a program that PyTorch runs without us?  By torch.export, each shared tensor once."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from vitcompress import artifact
from vitcompress.export.formats import Format, Written, limit_of
from vitcompress.export.program import trace
from vitcompress.export.subject import Subject


def write(subject: Subject, path: Path) -> Written:
    """Write a .pt2 file for batches of any size, and load it.

    Quantised matrices stay codes and scales, decoded by the program at each use; all else is as the model holds it.

    Args:
        subject: the artifact.
        path: the file to write.
    """
    student = artifact.load(subject.path, keep_quantized=True).requires_grad_(False)
    held = {id(t): t for t in (*student.parameters(), *student.buffers())}
    tensor_bytes = sum(t.numel() * t.element_size() for t in held.values())
    traced = trace(student, subject.input_size)
    traced.example_inputs = None  # images of zeros, which would go into the file
    held_in_memory = io.BytesIO()  # given a path, torch would write its passing name into the file
    torch.export.save(traced, held_in_memory)
    path.write_bytes(held_in_memory.getbuffer())
    program = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            outputs: Tensor = program(images)
        return outputs

    return Written(run, tensor_bytes, limit_of(subject, tensor_bytes))


PT2 = Format(write=write, suffix=".pt2")
