"""How does an artifact become a program for ExecuTorch, on phones and boards?  Lowered to XNNPACK, one image at a time.

floats    float32 weights, each shared one once
int8      codes per output channel as the artifact has them; activations are rounded as they run, image by image
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.errors import ExportError, VitcompressError
from vitcompress.export.formats import Format, Written, limit_of
from vitcompress.export.parity import EXACT, Run, Tolerance
from vitcompress.export.subject import Subject

ROUNDED = Tolerance(outputs=0.1, tie=0.1)  # what rounded activations do; how much it is, is said
NOTE = "Activations are rounded to 8 bits as the program runs: hence the difference."


def check(subject: Subject) -> None:
    """Make sure that XNNPACK has a type for the weights.

    Raises:
        VitcompressError: it has not.
    """
    if subject.manifest.store == "int4":
        raise VitcompressError(
            f"{subject.path}: weights of four bits cannot be kept so in --to executorch.",
            hint="Compress with --store int8.",
        )


def write(subject: Subject, path: Path) -> Written:
    """Write a .pte file, and load it in ExecuTorch's runtime.

    Args:
        subject: the artifact.
        path: the file to write.

    Raises:
        ExportError: the runtime cannot load it.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # of an extra
    from executorch.exir import to_edge_transform_and_lower

    example = (torch.zeros(1, *subject.input_size),)
    rounded = subject.manifest.store == "int8"
    with torch.no_grad():
        model = _rounded(subject.student, example) if rounded else subject.student
        program = torch.export.export(model, example)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(lowered.buffer)
    tensor_bytes = sum(_bytes_of(p, rounded=rounded) for p in subject.student.parameters())
    limit = limit_of(subject, tensor_bytes)
    return Written(_opened(path), tensor_bytes, limit, (NOTE,) if rounded else (), ROUNDED if rounded else EXACT)


def _rounded(student: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """The model with linear layers' weights as codes per output channel: the artifact's own, found from its floats."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    how = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    prepared = prepare_pt2e(torch.export.export(student, example).module(), how)
    prepared(*example)  # weights are looked at; the range of activations is found anew for each image
    model: nn.Module = convert_pt2e(prepared)
    return model


def _bytes_of(p: Tensor, *, rounded: bool) -> int:
    """Bytes that a parameter takes in the program: matrices one each, with a scale per row; all else is float32."""
    return p.numel() + 4 * len(p) if rounded and p.ndim == 2 else 4 * p.numel()


def _opened(path: Path) -> Run:
    from executorch.runtime import Runtime

    program: Any = Runtime.get().load_program(path)
    method = program.load_method("forward")
    if method is None:
        raise ExportError("ExecuTorch finds no forward pass in what was written")

    def run(images: Tensor) -> Tensor:
        return torch.cat([method.execute([image.unsqueeze(0).contiguous()])[0].clone() for image in images])

    return run


EXECUTORCH = Format(write=write, suffix=".pte", extra="executorch", check=check)
