"""How does an ONNX graph hold an artifact's tensors?  As they are stored, each shared one once, decoded by the graph.

    float32                    initializer ───────────────────────────────────────────────→ its uses
    float16, bfloat16          initializer ── Cast ───────────────────────────────────────→
    int8      codes, scale     initializers ── DequantizeLinear(axis 0) ──────────────────→
    int4      codes, scale     initializers ── DequantizeLinear(axis 1, blocks of 32) ── Reshape →

A runtime folds what is cast when it loads the file. Numbers are the artifact's own: nothing is rounded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import Tensor

from vitcompress.quantize.codecs import GROUP, SCALE, unpack

MIN_CAST = 64  # numbers: a shorter vector saves less than the node that casts it takes
MIN_NARROW = 256  # numbers: the same for constants that are no weights
_NARROW = (np.int8, np.int16, np.int32)


def hold_as_stored(model: ir.Model, stored: Mapping[str, Tensor], donors: Mapping[str, str], store: str) -> None:
    """Let a graph's weights be those of an artifact as it stores them, in place.

    Args:
        model: as the exporter made it: each parameter an initializer of its name, of a floating type.
        stored: the artifact's tensors.
        donors: the name each parameter is stored under, by every name it has.
        store: of the artifact, a key of `STORES`.
    """
    graph = model.graph
    decoded: dict[str, ir.Value] = {}
    nodes: list[ir.Node] = []
    for name in [name for name in graph.initializers if name in donors]:
        donor, old = donors[name], graph.initializers[name]
        graph.initializers.pop(name)
        if donor not in decoded:
            old.name = f"{donor}.floating"  # its name goes to what is stored
            decoded[donor] = _decoded(graph, donor, stored, old, store, nodes)
        old.replace_all_uses_with(decoded[donor])
    graph.insert_before(graph[0], nodes)


def _decoded(
    graph: ir.Graph, name: str, stored: Mapping[str, Tensor], old: ir.Value, store: str, nodes: list[ir.Node]
) -> ir.Value:
    """The value that stands for the parameter `name`; nodes that make it are added to `nodes`."""
    t, dtype, shape = stored[name], old.dtype, old.shape
    assert dtype is not None
    assert shape is not None
    if name + SCALE in stored:
        decode = {"int8": _decode_int8, "int4": _decode_int4}[store]
        return decode(graph, name, t, stored[name + SCALE], [int(n) for n in shape.numpy()], nodes)
    if not t.is_floating_point() or _dtype(t) == dtype:
        return _initializer(graph, name, _tensor(t))
    if t.numel() < MIN_CAST:
        return _initializer(graph, name, ir.tensor(t.float().numpy()))
    return _add(nodes, "Cast", [_initializer(graph, name, _tensor(t))], dtype, to=dtype.value)


def _decode_int8(
    graph: ir.Graph, name: str, codes: Tensor, scale: Tensor, shape: list[int], nodes: list[ir.Node]
) -> ir.Value:
    held = [_initializer(graph, name, _tensor(codes)), _initializer(graph, name + SCALE, _tensor(scale.float()))]
    return _add(nodes, "DequantizeLinear", held, ir.DataType.FLOAT, axis=0)


def _decode_int4(
    graph: ir.Graph, name: str, codes: Tensor, scale: Tensor, shape: list[int], nodes: list[ir.Node]
) -> ir.Value:
    width = int(np.prod(shape[1:]))
    rows = unpack(codes)[:, :width].contiguous()
    held = _initializer(graph, name, ir.tensor(rows.numpy().astype(ml_dtypes.int4)))
    short = _initializer(graph, name + SCALE, _tensor(scale))
    scales = _add(nodes, "Cast", [short], ir.DataType.FLOAT, to=ir.DataType.FLOAT.value)
    matrix = _add(nodes, "DequantizeLinear", [held, scales], ir.DataType.FLOAT, axis=1, block_size=GROUP)
    if len(shape) == 2:
        return matrix
    whole = _initializer(graph, f"{name}.shape", ir.tensor(np.array(shape, np.int64)))
    return _add(nodes, "Reshape", [matrix, whole], ir.DataType.FLOAT)


def tidy(model: ir.Model, stored: Mapping[str, Tensor]) -> None:
    """Fold what depends on no weight and no image, keep equal constants once and small, and drop the exporter's notes.

    Args:
        model: as `hold_as_stored` left it; changed in place.
        stored: the artifact's tensors, which are left as they are.
    """
    kept = {id(value) for name, value in model.graph.initializers.items() if name in stored}

    def foldable(node: ir.Node) -> bool | None:
        return False if any(id(value) in kept for value in node.inputs) else None

    optimizer.optimize_ir(model, should_fold=foldable, input_size_limit=1 << 20)
    common.DeduplicateInitializersPass(size_limit=1 << 40)(model)
    _narrow_constants(model.graph, kept)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()


def _narrow_constants(graph: ir.Graph, kept: set[int]) -> None:
    """Hold large constants in the fewest bytes that are exact: masks of 0 and −100, indices of positions."""
    nodes: list[ir.Node] = []
    for name, old in list(graph.initializers.items()):
        if id(old) in kept or old.const_value is None or old.const_value.size < MIN_NARROW:
            continue
        values, dtype = old.const_value.numpy(), old.const_value.dtype
        fits = next((kind for kind in _NARROW if _holds(kind, values)), None)
        if fits is None or np.dtype(fits).itemsize >= values.dtype.itemsize:
            continue
        graph.initializers.pop(name)
        old.name = f"{name}.wide"
        short = _initializer(graph, name, ir.tensor(values.astype(fits)))
        old.replace_all_uses_with(_add(nodes, "Cast", [short], dtype, to=dtype.value))
    graph.insert_before(graph[0], nodes)


def _holds(kind: type[np.signedinteger[Any]], values: np.ndarray[Any, Any]) -> bool:
    """Whether every number is an integer that `kind` has."""
    if values.dtype.kind not in "fi" or not np.isfinite(values).all():
        return False
    limits = np.iinfo(kind)
    return bool(values.min() >= limits.min and values.max() <= limits.max and (values == np.trunc(values)).all())


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _add(nodes: list[ir.Node], op: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: int) -> ir.Value:
    node = ir.node(op, inputs, attributes)
    node.outputs[0].dtype = dtype
    node.outputs[0].name = f"{inputs[0].name}.{op}"
    nodes.append(node)
    return node.outputs[0]


def _tensor(t: Tensor) -> ir.TensorProtocol:
    """A torch tensor for the graph; numpy has no bfloat16 of its own."""
    if t.dtype == torch.bfloat16:
        return ir.tensor(t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return ir.tensor(t.contiguous().numpy())


def _dtype(t: Tensor) -> ir.DataType:
    return _tensor(t[:0] if t.ndim else t).dtype


def same_numbers(held: ir.TensorProtocol, stored: Tensor) -> bool:
    """Whether an initializer holds what an artifact's tensor holds; types may differ where that is exact."""
    if held.dtype == ir.DataType.INT4:
        codes = unpack(stored)[:, : held.shape[1]]
        return bool((held.numpy().astype(np.int8) == codes.numpy()).all())
    found = torch.from_numpy(held.numpy().astype(np.float64))
    return found.shape == stored.shape and bool((found == stored.double()).all())
