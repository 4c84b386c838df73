"""Compute what options change in the linear layers of one block.

Every kind comes down to the same: the weights `[out, in]` of a layer in the student less those in
the teacher. Biases, where there are any, take up the mean of the change. Narrow queries and keys
change the products q·k instead: by q·E·k, with a matrix E for each head.

A new kind adds a function here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.initialize.factors import basis_of_readers, basis_of_writers
from vitcompress.initialize.layer_scale import WRITERS, layer_scale
from vitcompress.initialize.narrow import eliminate, head_maps, value_maps
from vitcompress.initialize.regression import Moments, factors_of_full_rank, regress, wide, with_ridge
from vitcompress.initialize.shared_matrices import Matrices, shared_matrix
from vitcompress.plans.make import layer_shapes
from vitcompress.search.options import Option

K = TypeVar("K")

QK = "attn.qk"
"""Stands for the products of queries and keys among a block's layers."""

Numbered = tuple[int, Option]
"""An option and its number among all options."""


@dataclass(frozen=True)
class LayerChanges:
    """Changes of one layer by several options.

    Attributes:
        numbers: numbers of the options, `[K]`.
        weights: `[K, out, in]`; of `QK`, `[K, heads, D, D]`. In bfloat16: rounding them changes
            costs by a thousandth at most.
    """

    numbers: Tensor
    weights: Tensor

    @classmethod
    def on(cls, device: torch.device, numbers: Sequence[int], weights: Tensor) -> LayerChanges:
        """Return changes on a device, in bfloat16."""
        return cls(torch.tensor(numbers, device=device), weights.to(device, torch.bfloat16))


BlockChanges = Mapping[str, LayerChanges]
"""Changes by layer, as named inside the block."""


def block_changes(
    block: Any, options: Sequence[Numbered], moments: Mapping[str, Moments], others: Sequence[BlockChanges]
) -> dict[str, LayerChanges]:
    """Compute the changes of one block by its own options, and join other changes.

    Args:
        block: the teacher's block.
        options: of this block alone.
        moments: of the inputs of its layers, by their names, and of its queries and keys,
            `attn.q` and `attn.k`.
        others: other changes of the block.
    """
    parts: dict[str, list[LayerChanges]] = defaultdict(list)
    device = next(block.parameters()).device
    for layer, changes in (item for other in others for item in other.items()):
        parts[layer].append(changes)
    with torch.no_grad():
        for scale, group in _grouped(options, lambda option: option.scale).items():
            for layer, weights in _SCALES[scale](block, [option for _, option in group], moments):
                parts[layer].append(LayerChanges.on(device, [n for n, _ in group], weights))
    return {
        layer: LayerChanges(torch.cat([c.numbers for c in joined]), torch.cat([c.weights for c in joined]))
        for layer, joined in parts.items()
    }


Changes = Iterator[tuple[str, Tensor]]


def _fewer_neurons(block: Any, options: Sequence[Option], moments: Mapping[str, Moments]) -> Changes:
    scale = layer_scale(block, "mlp")[0][:, None]
    weight = wide(block.mlp.fc2.weight) * scale
    counts = [option.dial for option in options]
    changes = dict.fromkeys(counts, -weight)
    best = eliminate(moments["mlp.fc2"].covariance(), weight, counts)
    for count, (kept, left) in zip(sorted(counts, reverse=True), best, strict=True):
        changes[count] = changes[count].index_add(1, kept, left)
    yield "mlp.fc2", torch.stack([(changes[count] / scale).float() for count in counts])


def _narrow_values(block: Any, options: Sequence[Option], moments: Mapping[str, Moments]) -> Changes:
    weight, covariance = wide(block.attn.proj.weight), moments["attn.proj"].covariance()
    maps = value_maps(covariance, weight, block.attn.num_heads)
    changes = []
    for option in options:
        narrow = torch.block_diag(*(rows[: option.dial] for rows in maps))  # values of all heads, [H·v, H·D]
        products = covariance @ narrow.T
        changes.append((regress(narrow @ products, weight @ products) @ narrow - weight).float())
    yield "attn.proj", torch.stack(changes)


def _narrow_queries(block: Any, options: Sequence[Option], moments: Mapping[str, Moments]) -> Changes:
    pairs = head_maps(moments["attn.q"], moments["attn.k"], block.attn.num_heads)
    kept = [torch.stack([q[: o.dial].T @ k[: o.dial] for q, k in pairs]) for o in options]
    yield QK, torch.stack([(products - torch.eye(products.shape[-1]).to(products)).float() for products in kept])


def _low_rank(block: nn.Module, options: Sequence[Option], moments: Mapping[str, Moments]) -> Changes:
    scales = {WRITERS[part]: layer_scale(block, part)[0][:, None] for part in WRITERS}
    for layer in options[0].group.ranks:
        linear: Any = block.get_submodule(layer)
        weight, inputs = wide(linear.weight), moments[layer]
        covariance = inputs.second() if linear.bias is None else inputs.covariance()
        scale = scales.get(layer, torch.ones(1, 1).to(weight))
        up, down = factors_of_full_rank(scale * weight, covariance)
        ranks = [option.group.ranks[layer] for option in options]
        yield layer, torch.stack([(up[:, :rank] @ down[:rank] / scale - weight).float() for rank in ranks])


def _skip(block: nn.Module, options: Sequence[Option], moments: Mapping[str, Moments]) -> Changes:
    layer = WRITERS[options[0].part]
    yield layer, -block.get_parameter(f"{layer}.weight").detach().expand(len(options), -1, -1)


_SCALES = {
    "mlp.hidden": _fewer_neurons, "attn.v": _narrow_values, "attn.qk": _narrow_queries, "attn.rank": _low_rank,
    "mlp.rank": _low_rank, "attn.skip": _skip, "mlp.skip": _skip,
}  # fmt: skip


def run_changes(
    model: nn.Module, family: Family, options: Sequence[Numbered], moments: Mapping[str, Mapping[str, Moments]]
) -> dict[str, dict[str, LayerChanges]]:
    """Compute the changes of options of several blocks, by block and layer.

    What a start refines in rounds is computed once here.

    Args:
        model: the teacher, its blocks aligned.
        family: of the model.
        options: of several blocks each.
        moments: of the inputs of the layers, by block and layer.
    """
    changes: dict[str, dict[str, LayerChanges]] = defaultdict(dict)
    runs = _grouped(options, lambda option: (option.group.blocks, option.part))
    by_layer: dict[str, list[tuple[tuple[str, ...], list[Numbered]]]] = defaultdict(list)
    for (blocks, part), numbered in runs.items():
        for layer in layer_shapes(family, model.get_submodule(blocks[0])):
            if layer.split(".")[0] == part:
                by_layer[layer].append((blocks, numbered))
    for layer, found in by_layer.items():
        parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        shared = _SharedLayer(model, family, layer, moments)
        with torch.no_grad():
            for blocks, numbered in found:
                for number, block, change in shared.changes(blocks, numbered):
                    parts[block].append((number, change.bfloat16()))
        for block, numbers in parts.items():
            device = model.get_parameter(f"{block}.{layer}.weight").device
            weights = torch.stack([change for _, change in numbers])
            changes[block][layer] = LayerChanges.on(device, [number for number, _ in numbers], weights)
    return changes


@dataclass(frozen=True)
class _SharedLayer:
    """A layer of all blocks, which runs of blocks may share.

    Attributes:
        model: the teacher, its blocks aligned.
        family: of the model.
        layer: as named inside a block.
        moments: of the inputs of the layers, by block and layer.
        products: of weights and second moments by block, which runs have in common.
    """

    model: nn.Module
    family: Family
    layer: str
    moments: Mapping[str, Mapping[str, Moments]]
    products: dict[str, Tensor] = field(default_factory=dict)

    def changes(self, blocks: Sequence[str], options: Sequence[Numbered]) -> Iterator[tuple[int, str, Tensor]]:
        """Yield the number, block and change of each option of one run."""
        linears: dict[str, Any] = {block: self.model.get_submodule(f"{block}.{self.layer}") for block in blocks}
        weights = {block: wide(linear.weight) for block, linear in linears.items()}
        found = {block: self.moments[block][self.layer] for block in blocks}
        centered = linears[blocks[0]].bias is not None
        inputs = {block: m.centered() if centered else m.uncentered() for block, m in found.items()}
        for block in set(blocks) - self.products.keys():
            self.products[block] = weights[block] @ inputs[block]
        shared = shared_matrix(weights, inputs, {block: self.products[block] for block in blocks})
        covariances = {block: with_ridge(matrix) for block, matrix in inputs.items()}
        writes = bool(self.family.writes.fullmatch(self.layer))
        for kind, numbered in _grouped(options, lambda option: option.kind).items():
            products = _RUNS[kind](weights, covariances, shared, writes)
            for block, weight in weights.items():
                for number, option in numbered:
                    yield number, block, (products(block, option.dial) - weight).float()


def _grouped(options: Sequence[Numbered], key: Callable[[Option], K]) -> dict[K, list[Numbered]]:
    groups: dict[K, list[Numbered]] = defaultdict(list)
    for number, option in options:
        groups[key(option)].append((number, option))
    return groups


Products = Callable[[str, int], Tensor]
"""Gives the matrix `[out, in]` of a block at a rank."""


def _share(weights: Matrices, covariances: Matrices, shared: Tensor, writes: bool) -> Products:
    return lambda block, rank: shared


def _adapter(weights: Matrices, covariances: Matrices, shared: Tensor, writes: bool) -> Products:
    factors = {b: factors_of_full_rank(weight - shared, covariances[b]) for b, weight in weights.items()}
    return lambda block, rank: shared + factors[block][0][:, :rank] @ factors[block][1][:rank]


def _basis(weights: Matrices, covariances: Matrices, shared: Tensor, writes: bool) -> Products:
    if writes:
        columns = basis_of_writers(weights, covariances)
        return lambda block, rank: columns[:, :rank] @ (columns[:, :rank].T @ weights[block])
    rows = basis_of_readers(weights, covariances)

    def product(block: str, rank: int) -> Tensor:
        projected = covariances[block] @ rows[:rank].T
        return regress(rows[:rank] @ projected, weights[block] @ projected) @ rows[:rank]

    return product


_RUNS = {"share": _share, "adapter": _adapter, "basis": _basis}
