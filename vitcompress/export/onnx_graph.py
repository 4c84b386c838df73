"""Put an artifact's tensors into an ONNX graph as they are stored, each shared one once.

    float32                    initializer ───────────────────────────────────────────────→ its uses
    float16, bfloat16          initializer ── Cast ───────────────────────────────────────→
    int8      codes, scale     initializers ── DequantizeLinear(axis 0) ──────────────────→
    int4      codes, scale     initializers ── DequantizeLinear(axis 1, blocks of 32) ── Reshape →

The graph decodes them; a runtime folds the casts when it loads the file. Nothing is rounded again.
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

MIN_CAST = 64  # numbers; casting a shorter vector saves less than the node takes
MIN_NARROW = 256  # numbers; the same for constants that are not weights
_NARROW = (np.int8, np.int16, np.int32)


def use_stored_tensors(model: ir.Model, stored: Mapping[str, Tensor], donors: Mapping[str, str], store: str) -> None:
    """Replace a graph's weights by an artifact's tensors as they are stored, in place.

    Args:
        model: as torch exported it: each parameter is an initializer of the same name, of a
            floating type.
        stored: the artifact's tensors.
        donors: name that each parameter is stored under, by every name it has.
        store: the artifact's store, a key of `STORES`.
    """
    graph = model.graph
    decoded: dict[str, ir.Value] = {}
    nodes: list[ir.Node] = []
    for name in [name for name in graph.initializers if name in donors]:
        donor, old = donors[name], graph.initializers[name]
        graph.initializers.pop(name)
        if donor not in decoded:
            old.name = f"{donor}.floating"  # the stored tensor takes its name
            decoded[donor] = _add_decoder(graph, donor, stored, old, store, nodes)
        old.replace_all_uses_with(decoded[donor])
    graph.insert_before(graph[0], nodes)


def _add_decoder(
    graph: ir.Graph, name: str, stored: Mapping[str, Tensor], old: ir.Value, store: str, nodes: list[ir.Node]
) -> ir.Value:
    """Return the value that replaces parameter `name`; append its nodes to `nodes`."""
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
    inputs = [_initializer(graph, name, _tensor(codes)), _initializer(graph, name + SCALE, _tensor(scale.float()))]
    return _add(nodes, "DequantizeLinear", inputs, ir.DataType.FLOAT, axis=0)


def _decode_int4(
    graph: ir.Graph, name: str, codes: Tensor, scale: Tensor, shape: list[int], nodes: list[ir.Node]
) -> ir.Value:
    width = int(np.prod(shape[1:]))
    rows = unpack(codes)[:, :width].contiguous()
    packed = _initializer(graph, name, ir.tensor(rows.numpy().astype(ml_dtypes.int4)))
    half = _initializer(graph, name + SCALE, _tensor(scale))
    scales = _add(nodes, "Cast", [half], ir.DataType.FLOAT, to=ir.DataType.FLOAT.value)
    matrix = _add(nodes, "DequantizeLinear", [packed, scales], ir.DataType.FLOAT, axis=1, block_size=GROUP)
    if len(shape) == 2:
        return matrix
    full_shape = _initializer(graph, f"{name}.shape", ir.tensor(np.array(shape, np.int64)))
    return _add(nodes, "Reshape", [matrix, full_shape], ir.DataType.FLOAT)


def optimize(model: ir.Model, stored: Mapping[str, Tensor]) -> None:
    """Make a graph smaller, in place: fold, merge and narrow constants, drop metadata.

    Args:
        model: the graph, after `use_stored_tensors`.
        stored: the artifact's tensors; these stay as they are.
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
    """Store large constants, such as masks and indices, in the smallest exact integer type."""
    nodes: list[ir.Node] = []
    for name, old in list(graph.initializers.items()):
        if id(old) in kept or old.const_value is None or old.const_value.size < MIN_NARROW:
            continue
        values, dtype = old.const_value.numpy(), old.const_value.dtype
        narrow = next((kind for kind in _NARROW if _holds(kind, values)), None)
        if narrow is None or np.dtype(narrow).itemsize >= values.dtype.itemsize:
            continue
        graph.initializers.pop(name)
        old.name = f"{name}.wide"
        constant = _initializer(graph, name, ir.tensor(values.astype(narrow)))
        old.replace_all_uses_with(_add(nodes, "Cast", [constant], dtype, to=dtype.value))
    graph.insert_before(graph[0], nodes)


def _holds(kind: type[np.signedinteger[Any]], values: np.ndarray[Any, Any]) -> bool:
    """Return whether every number is an integer in the range of `kind`."""
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
    """Convert a torch tensor for the graph; numpy itself has no bfloat16."""
    if t.dtype == torch.bfloat16:
        return ir.tensor(t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return ir.tensor(t.contiguous().numpy())


def _dtype(t: Tensor) -> ir.DataType:
    return _tensor(t[:0] if t.ndim else t).dtype


def same_numbers(initializer: ir.TensorProtocol, stored: Tensor) -> bool:
    """Return whether an initializer has exactly the numbers of a stored tensor, in any type."""
    if initializer.dtype == ir.DataType.INT4:
        codes = unpack(stored)[:, : initializer.shape[1]]
        return bool((initializer.numpy().astype(np.int8) == codes.numpy()).all())
    numbers = torch.from_numpy(initializer.numpy().astype(np.float64))
    return numbers.shape == stored.shape and bool((numbers == stored.double()).all())
