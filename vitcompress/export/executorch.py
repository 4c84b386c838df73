"""Export to ExecuTorch, for phones and boards: lowered to XNNPACK, one image at a time.

floats    float32 weights, each shared one once
int8      codes per output channel, as in the artifact; activations are rounded at run time, per
image
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.errors import ExportError, VitcompressError
from vitcompress.export.format import Format, Written, limit_of
from vitcompress.export.loaded import LoadedArtifact
from vitcompress.export.parity import EXACT, Run, Tolerance

ROUNDED = Tolerance(outputs=0.1, tie=0.1)  # rounded activations differ this much; the report says how much they do
NOTE = "Activations are rounded to 8 bits at run time; outputs differ because of that."


def check(artifact: LoadedArtifact) -> None:
    """Check that XNNPACK has a type for the weights.

    Raises:
        VitcompressError: it has none.
    """
    if artifact.manifest.store == "int4":
        raise VitcompressError(
            f"{artifact.path} has weights of four bits, which --to executorch does not support.",
            hint="Compress with --store int8.",
        )


def write(artifact: LoadedArtifact, path: Path) -> Written:
    """Write a .pte file, and load it in ExecuTorch's runtime.

    Args:
        artifact: the artifact.
        path: path of the file.

    Raises:
        ExportError: the runtime cannot load it.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # in an extra
    from executorch.exir import to_edge_transform_and_lower

    example = (torch.zeros(1, *artifact.input_size),)
    quantized = artifact.manifest.store == "int8"
    with torch.no_grad():
        model = _quantize(artifact.student, example) if quantized else artifact.student
        program = torch.export.export(model, example)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(lowered.buffer)
    tensor_bytes = sum(_bytes_of(p, quantized=quantized) for p in artifact.student.parameters())
    limit = limit_of(artifact, tensor_bytes)
    return Written(
        _open_program(path), tensor_bytes, limit, (NOTE,) if quantized else (), ROUNDED if quantized else EXACT
    )


def _quantize(student: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """Quantize linear layers per output channel; this recomputes the artifact's own codes."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    prepared = prepare_pt2e(torch.export.export(student, example).module(), quantizer)
    prepared(*example)  # observes the weights; the range of activations is computed per image at run time
    model: nn.Module = convert_pt2e(prepared)
    return model


def _bytes_of(p: Tensor, *, quantized: bool) -> int:
    """Return the size of a parameter: float32, or for matrices int8 and a scale per row."""
    return p.numel() + 4 * len(p) if quantized and p.ndim == 2 else 4 * p.numel()


def _open_program(path: Path) -> Run:
    """Load a .pte file in ExecuTorch's runtime.

    Raises:
        ExportError: the file has no forward pass.
    """
    from executorch.runtime import Runtime

    program: Any = Runtime.get().load_program(path)
    method = program.load_method("forward")
    if method is None:
        raise ExportError("ExecuTorch finds no forward pass in the file")

    def run(images: Tensor) -> Tensor:
        return torch.cat([method.execute([image.unsqueeze(0).contiguous()])[0].clone() for image in images])

    return run


EXECUTORCH = Format(write=write, suffix=".pte", extra="executorch", check=check)
