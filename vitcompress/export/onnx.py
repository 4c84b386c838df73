"""How does an artifact become an ONNX file?  Traced, exported by torch, then given its tensors as they are stored."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from vitcompress.errors import ExportError, VitcompressError, shorten
from vitcompress.export.formats import Format, Written, limit_of
from vitcompress.export.parity import Run
from vitcompress.export.program import trace
from vitcompress.export.subject import Subject

OPSET, OPSET_INT4 = 18, 21  # ONNX has numbers of four bits since 21
INPUT, OUTPUT = "images", "logits"
MOST_BYTES = 2_000_000_000  # a protobuf ends at 2 GiB


def check(subject: Subject) -> None:
    """Make sure that the file will not be larger than ONNX files can be.

    Raises:
        VitcompressError: it would.
    """
    if subject.tensor_bytes > MOST_BYTES:
        raise VitcompressError(
            f"{subject.path}: tensors of {subject.tensor_bytes / 1e9:.1f} GB; an ONNX file ends at 2 GB.",
            hint="Compress with --store fp16 or int8.",
        )


def write(subject: Subject, path: Path) -> Written:
    """Write an ONNX file for batches of any size, and open it in onnxruntime.

    Each tensor is there once, in the type it is stored in: int8 and int4 with DequantizeLinear, float16 with Cast.

    Args:
        subject: the artifact.
        path: the file to write.

    Raises:
        ExportError: a tensor is missing in the file, or there with other numbers.
    """
    import onnx_ir  # of an extra, like onnxruntime

    from vitcompress.export.graph import hold_as_stored, tidy

    program = torch.onnx.export(
        trace(subject.student, subject.input_size), (), dynamo=True, optimize=False, verbose=False,
        opset_version=OPSET_INT4 if subject.manifest.store == "int4" else OPSET,
        input_names=[INPUT], output_names=[OUTPUT],
    )  # fmt: skip
    assert program is not None
    model = program.model
    hold_as_stored(model, subject.tensors, donors_of(subject.student), subject.manifest.store)
    tidy(model, subject.tensors)
    model.graph.name = subject.manifest.source["architecture"]
    onnx_ir.save(model, path)
    tensor_bytes = check_tensors(path, subject)
    return Written(open_session(path), tensor_bytes, limit_of(subject, subject.tensor_bytes))


def donors_of(student: nn.Module) -> dict[str, str]:
    """The name that each entry of a state dict is stored under, by every name it has."""
    first = {id(p): name for name, p in student.named_parameters()}
    every = {name: first[id(p)] for name, p in student.named_parameters(remove_duplicate=False)}
    return {name: every.get(name, name) for name in student.state_dict()}


def check_tensors(path: Path, subject: Subject) -> int:
    """Make sure that a file holds the artifact's tensors, each once and with the same numbers.

    Returns:
        Bytes of all that it holds.

    Raises:
        ExportError: it does not.
    """
    import onnx_ir

    from vitcompress.export.graph import same_numbers

    held = onnx_ir.load(path).graph.initializers
    wrong = [
        name
        for name, t in subject.tensors.items()
        if name in held and not same_numbers(held[name].const_value, t)  # type: ignore[arg-type]
    ]
    if wrong:
        raise ExportError(f"these tensors are others than the artifact's: {shorten(sorted(wrong))}")
    # Equal tensors are one in the graph: transformations that nothing has trained yet are all the identity.
    there = {_content(subject.tensors[name]) for name in held if name in subject.tensors}
    missing = [name for name, t in subject.tensors.items() if t.ndim > 1 and _content(t) not in there]
    if missing:
        raise ExportError(f"these tensors are not there: {shorten(sorted(missing))}")
    return sum(value.const_value.nbytes for value in held.values() if value.const_value is not None)


def _content(t: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """What makes a tensor equal to another, without holding both."""
    return t.dtype, t.shape, sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).digest()


def open_session(path: Path, threads: int = 0) -> Run:
    """Run an ONNX file in onnxruntime, on CPU.

    Args:
        path: the file.
        threads: that compute; 0 for onnxruntime's choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are about what it optimises
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run


ONNX = Format(
    write=write, suffix=".onnx", extra="onnx", check=check,
)  # fmt: skip
