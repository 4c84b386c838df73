"""Choose the neurons and channels that a narrow block keeps, and set its layers.

MLP     neurons are removed a few at a time, each time those that the others replace best (optimal
        brain surgeon on the second layer); then the second layer is fitted again
heads   q·k and P·v·proj are products of two maps: each is cut to its largest singular values,
        weighted by the second moments of its inputs; then the projection is fitted again
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from vitcompress.initialize.regression import Moments, regress, roots, wide

STEPS = 64
"""A step removes one of so many neurons; one by one chooses no better."""

_DENSITY = 0.8  # of what is left, below which matrices are made smaller


def eliminate(covariance: Tensor, weight: Tensor, counts: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Remove hidden neurons a few at a time, and yield what is left at some counts.

    Each time those go that the others replace best, and the next layer's weights take up what the
    others predict of them.

    Args:
        covariance: covariance of the hidden activations, `[M, M]`, invertible.
        weight: the best weight of the layer after them, `[C, M]`.
        counts: numbers of neurons to stop at, none twice, in any order.

    Yields:
        For each count, largest first: indices of the neurons that are left, `[count]`, ascending,
        and the best weight of the layer after them, `[C, count]`.

    Source: Hassibi and Stork 1993, optimal brain surgeon; for neurons, Frantar and Alistarh 2022,
        arXiv:2208.11580.
    """
    left = _Left(weight, torch.cholesky_inverse(torch.linalg.cholesky(covariance)))
    step = max(1, left.count // STEPS)
    for count in sorted(counts, reverse=True):
        while left.count - step >= count:
            left.remove(step)
        # the last, smaller step is taken aside: what is left at one count does not depend on others
        yield left.after(left.count - count)


class _Left:
    """Neurons that are left.

    What is removed leaves zeros in the weight and the inverse; these are made smaller now and then,
    as copying a large matrix takes longer than updating it.

    Args:
        weight: best weight of the layer after all neurons, `[C, M]`.
        inverse: inverse of the covariance of their activations, `[M, M]`; overwritten.
    """

    def __init__(self, weight: Tensor, inverse: Tensor) -> None:
        self.weight, self.inverse = weight.clone(), inverse
        self.indices = torch.arange(len(inverse), device=inverse.device)  # of the neurons in both
        self.is_left = torch.ones_like(self.indices, dtype=torch.bool)
        self.count = len(inverse)

    def remove(self, count: int) -> None:
        """Remove the `count` neurons that the others replace best."""
        removed, solved = self._replaced(count)
        self.inverse.addmm_(self.inverse[:, removed], solved, alpha=-1)  # a Schur complement
        self.weight.addmm_(self.weight[:, removed], solved, alpha=-1)
        self.is_left[removed] = False
        self.count -= count
        if self.count <= _DENSITY * len(self.indices):
            rest = self.is_left.nonzero().flatten()
            self.indices, self.weight = self.indices[rest], self.weight[:, rest]
            self.inverse = self.inverse[rest].index_select(1, rest)
            self.is_left = torch.ones_like(self.indices, dtype=torch.bool)

    def after(self, count: int) -> tuple[Tensor, Tensor]:
        """Return what `remove` would leave: the neurons, `[M]`, and the weight after them."""
        weight, is_left = self.weight, self.is_left
        if count:
            removed, solved = self._replaced(count)
            weight = weight - weight[:, removed] @ solved
            is_left = is_left.index_fill(0, removed, False)
        rest = is_left.nonzero().flatten()
        return self.indices[rest], weight[:, rest]

    def _replaced(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the places of the neurons to remove, and how the others replace them."""
        cost = self.weight.square().sum(0) / self.inverse.diagonal()
        removed = cost.masked_fill(~self.is_left, torch.inf).argsort(stable=True)[:count]
        rows = self.inverse[removed]
        return removed, torch.linalg.solve(rows[:, removed], rows)


def narrow_mlp(mlp: Any, teacher_mlp: Any, hidden: Moments, scale: Tensor) -> None:
    """Set a narrow MLP, in place.

    Args:
        mlp: timm's `Mlp`, narrow.
        teacher_mlp: the MLP of the teacher's block.
        hidden: moments of the teacher's hidden activations; targets are additions to the stream.
        scale: LayerScale after the MLP, `[C]`, nowhere zero.
    """
    covariance, cross = hidden.covariance(), hidden.cross()
    kept, _ = next(eliminate(covariance, regress(covariance, cross), [mlp.fc1.out_features]))
    weight = regress(covariance[kept][:, kept], cross[:, kept])
    with torch.no_grad():
        mlp.fc1.weight.copy_(teacher_mlp.fc1.weight[kept])
        mlp.fc1.bias.copy_(teacher_mlp.fc1.bias[kept])
        mlp.fc2.weight.copy_(weight / scale[:, None])
        mlp.fc2.bias.copy_((hidden.mean_target - weight @ hidden.mean[kept]) / scale)


def head_maps(q: Moments, k: Moments, heads: int) -> list[tuple[Tensor, Tensor]]:
    """Return maps of each head's queries and keys, whose first rows keep most of the products.

    Args:
        q: moments of the queries of all heads, concatenated, `H·D` wide.
        k: moments of the keys, likewise.
        heads: H.

    Returns:
        For each head the maps `[D, D]` of queries and of keys.
    """
    # shifting all keys adds a constant to the logits of a query: only their covariance counts
    queries, keys = q.uncentered(), k.covariance()
    dim = len(queries) // heads
    maps = []
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        q_root, q_inverse = roots(queries[part, part])
        k_root, k_inverse = roots(keys[part, part])
        u, s, vt = torch.linalg.svd(q_root @ k_root)
        maps.append(((s.sqrt()[:, None] * u.T) @ q_inverse, (s.sqrt()[:, None] * vt) @ k_inverse))
    return maps


def value_maps(covariance: Tensor, weight: Tensor, heads: int) -> list[Tensor]:
    """Return maps `[D, D]` of each head's values, whose first rows keep most of its outputs.

    Args:
        covariance: of the values after the attention maps, of all heads, `[H·D, H·D]`.
        weight: of the projection after them, `[C, H·D]`.
        heads: H.
    """
    dim = len(covariance) // heads
    maps = []
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        root, inverse = roots(covariance[part, part])
        u, s, _ = torch.linalg.svd(root @ weight[:, part].T, full_matrices=False)
        maps.append((s.sqrt()[:, None] * u.T) @ inverse)
    return maps


def narrow_heads(attn: Any, teacher_attn: Any, q: Moments, k: Moments, attended: Moments) -> None:
    """Set the queries, keys and values of an attention with narrow heads, in place.

    Its projection is fitted afterwards, by `fit_layer`.

    Args:
        attn: the narrow attention.
        teacher_attn: the attention of the teacher's block.
        q: moments of the queries of all heads, concatenated, `H·D` wide.
        k: moments of the keys, likewise.
        attended: moments of the values after the attention maps, likewise.
    """
    heads = attn.num_heads
    v = attn.proj.in_features // heads
    qk = (attn.qkv.out_features // heads - v) // 2
    pairs = head_maps(q, k, heads)
    values = value_maps(attended.covariance(), wide(teacher_attn.proj.weight), heads)
    maps = ([pair[0][:qk] for pair in pairs], [pair[1][:qk] for pair in pairs], [rows[:v] for rows in values])
    dim = teacher_attn.proj.in_features // heads
    weight = wide(teacher_attn.qkv.weight).unflatten(0, (3, heads, dim))
    bias = wide(teacher_attn.qkv.bias).unflatten(0, (3, heads, dim))
    with torch.no_grad():
        attn.qkv.weight.copy_(torch.cat([maps[i][h] @ weight[i, h] for i in range(3) for h in range(heads)]))
        attn.qkv.bias.copy_(torch.cat([maps[i][h] @ bias[i, h] for i in range(3) for h in range(heads)]))


def fit_layer(layer: Any, inputs: Moments, scale: Tensor) -> None:
    """Set a linear layer to the best prediction of its targets, in place.

    Args:
        layer: linear, with a bias.
        inputs: moments of its inputs; targets are additions to the stream.
        scale: LayerScale after the layer, `[C]`, nowhere zero.
    """
    weight = regress(inputs.covariance(), inputs.cross())
    with torch.no_grad():
        layer.weight.copy_(weight / scale[:, None])
        layer.bias.copy_((inputs.mean_target - weight @ inputs.mean) / scale)
