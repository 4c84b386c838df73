"""Export to .pt2, a program that PyTorch runs without vitcompress and timm."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path

import torch

from vitcompress.artifact.load import load
from vitcompress.errors import ExportError
from vitcompress.export.format import SLACK, Format, Written, limit_of, trace
from vitcompress.export.loaded import LoadedArtifact

NODE_BYTES = 3_000  # per step of the program, for its description
CONSTANT_BYTES = 20_000  # for constants that are computed while tracing


def write(artifact: LoadedArtifact, path: Path) -> Written:
    """Write a .pt2 file for batches of any size, and load it.

    Quantized matrices stay codes and scales, which the program decodes at each use. Other tensors
    have the types that they have in the model.

    Args:
        artifact: the artifact.
        path: path of the file.

    Raises:
        ExportError: the file holds shared tensors more than once.
    """
    student = load(artifact.path, keep_quantized=True).requires_grad_(False)
    tensor_bytes = sum(t.nbytes for t in (*student.parameters(), *student.buffers()))  # each shared one once
    traced = trace(student, artifact.input_size)
    traced.example_inputs = None  # zeros, which would be stored in the file
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # names lines of our source files
    content = io.BytesIO()  # given a path, torch would store its temporary name in the file
    torch.export.save(traced, content, extra_files={"data_config.json": artifact.data_config_json})
    path.write_bytes(content.getbuffer())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.9, about its own code
        program = torch.export.load(path).module()

    _check_tensors(path, tensor_bytes)
    return Written(program, tensor_bytes, limit_of(artifact, tensor_bytes) + NODE_BYTES * len(traced.graph.nodes))


def _check_tensors(path: Path, tensor_bytes: int) -> None:
    """Check that a file holds each tensor once, by the size of all tensors.

    Raises:
        ExportError: it holds more.
    """
    with zipfile.ZipFile(path) as file:
        stored = sum(info.file_size for info in file.infolist() if re.search(r"/(weight|tensor)_\d+$", info.filename))
    if stored > SLACK * tensor_bytes + CONSTANT_BYTES:
        raise ExportError(
            f"its tensors have {stored:,} bytes, the model's {tensor_bytes:,}: shared ones are stored more than once"
        )


PT2 = Format(write=write, suffix=".pt2")
