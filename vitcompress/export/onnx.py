"""Export to ONNX, with the tensors as the artifact stores them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from vitcompress.artifact.digest import memory_of
from vitcompress.errors import ExportError, VitcompressError, shorten
from vitcompress.export.format import Format, Written, limit_of, trace
from vitcompress.export.loaded import LoadedArtifact
from vitcompress.export.parity import Run

OPSET, OPSET_INT4 = 18, 21  # ONNX has four-bit numbers since opset 21
INPUT, OUTPUT = "images", "logits"
MAX_BYTES = 2_000_000_000  # a protobuf ends at 2 GiB


def check(artifact: LoadedArtifact) -> None:
    """Check that the tensors fit into an ONNX file.

    Raises:
        VitcompressError: they do not.
    """
    if artifact.tensor_bytes > MAX_BYTES:
        raise VitcompressError(
            f"{artifact.path} has {artifact.tensor_bytes / 1e9:.1f} GB of tensors; an ONNX file holds at most 2 GB.",
            hint="Compress with --store fp16 or int8.",
        )


def write(artifact: LoadedArtifact, path: Path) -> Written:
    """Write an ONNX file for batches of any size, and open it in onnxruntime.

    Each tensor is stored once, in the type it has in the artifact: int8 and int4 with
    DequantizeLinear, float16 with Cast.

    Args:
        artifact: the artifact.
        path: path of the file.

    Raises:
        ExportError: a tensor is missing in the file, or has other numbers there.
    """
    import onnx_ir  # in an extra, like onnxruntime

    from vitcompress.export.onnx_graph import optimize, use_stored_tensors

    store = artifact.manifest.store
    program = torch.onnx.export(
        trace(artifact.student, artifact.input_size), (), dynamo=True, optimize=False, verbose=False,
        opset_version=OPSET_INT4 if store == "int4" else OPSET,
        input_names=[INPUT], output_names=[OUTPUT],
    )  # fmt: skip
    assert program is not None
    model = program.model
    use_stored_tensors(model, artifact.tensors, donors_of(artifact.student), store)
    optimize(model, artifact.tensors)
    model.graph.name = artifact.manifest.source["architecture"]
    model.metadata_props["data_config"] = artifact.data_config_json
    onnx_ir.save(model, path)
    tensor_bytes = check_tensors(path, artifact)
    return Written(open_session(path), tensor_bytes, limit_of(artifact, artifact.tensor_bytes))


def donors_of(student: nn.Module) -> dict[str, str]:
    """Return the name that each entry of the state dict is stored under, by every name it has."""
    first = {id(p): name for name, p in student.named_parameters()}
    donors = {name: first[id(p)] for name, p in student.named_parameters(remove_duplicate=False)}
    return {name: donors.get(name, name) for name in student.state_dict()}


def check_tensors(path: Path, artifact: LoadedArtifact) -> int:
    """Check that a file holds the artifact's tensors, each once and with the same numbers.

    Returns:
        Size of all tensors in the file, in bytes.

    Raises:
        ExportError: tensors are missing or differ.
    """
    import onnx_ir

    from vitcompress.export.onnx_graph import same_numbers

    initializers = onnx_ir.load(path).graph.initializers
    wrong = [
        name
        for name, t in artifact.tensors.items()
        if name in initializers and not same_numbers(initializers[name].const_value, t)  # type: ignore[arg-type]
    ]
    if wrong:
        raise ExportError(f"these tensors differ from the artifact's: {shorten(sorted(wrong))}")
    # Equal tensors are one in the graph: untrained transformations, for example, are all the
    # identity.
    present = {_fingerprint(artifact.tensors[name]) for name in initializers if name in artifact.tensors}
    missing = [name for name, t in artifact.tensors.items() if t.ndim > 1 and _fingerprint(t) not in present]
    if missing:
        raise ExportError(f"these tensors are missing: {shorten(sorted(missing))}")
    return sum(value.const_value.nbytes for value in initializers.values() if value.const_value is not None)


def _fingerprint(t: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """Return a value that is the same for equal tensors, without holding their numbers."""
    return t.dtype, t.shape, sha256(memory_of(t.contiguous())).digest()


def open_session(path: Path, threads: int = 0) -> Run:
    """Open an ONNX file in onnxruntime, on CPU.

    Args:
        path: path of the file.
        threads: number of threads; 0 for onnxruntime's choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are about its own optimizations
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run


ONNX = Format(write=write, suffix=".onnx", extra="onnx", check=check)
