"""Which neurons and channels does a narrow block keep?  Those from which the rest can be told best.

    MLP     neurons are taken away a few at a time, each time those whose loss the others make up for best (optimal
            brain surgeon on the second layer); the second layer is fitted anew
    heads   q·k and P·v·proj are products of two maps: each is cut to its largest singular values, weighted by the
            second moments of what passes; the projection is fitted anew

Everything is fitted to what the student's own blocks before this one give, so that errors do not pile up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitcompress.initialize.regression import Moments, regress, roots

ROUNDS = 32


def choose_neurons(covariance: Tensor, weight: Tensor, count: int) -> Tensor:
    """Indices `[count]`, ascending, of the hidden neurons to keep.

    Args:
        covariance: of the hidden activations, `[M, M]`, invertible.
        weight: of the layer after them, `[C, M]`.
        count: how many.

    Source: Hassibi and Stork 1993, optimal brain surgeon; for neurons, Frantar and Alistarh 2022, arXiv:2208.11580.
    """
    kept = torch.arange(len(covariance), device=covariance.device)
    inverse = torch.linalg.inv(covariance)
    for left in range(ROUNDS, 0, -1):  # a few at a time: one by one chooses no better, and takes minutes at width 3072
        cost = weight.square().sum(0) / inverse.diagonal()
        gone = cost.argsort(stable=True)[: -(-(len(kept) - count) // left)]
        if not len(gone):
            break
        rest = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        rest[gone] = False
        # what is left of the inverse once the inputs that go are no more: its Schur complement
        lost = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, rest])
        weight = weight[:, rest] - weight[:, gone] @ lost
        inverse = inverse[rest][:, rest] - inverse[rest][:, gone] @ lost
        kept = kept[rest]
    return kept


def narrow_mlp(mlp: Any, own: Any, hidden: Moments, scale: Tensor) -> None:
    """Set a narrow MLP, in place.

    Args:
        mlp: timm's `Mlp`, narrow.
        own: the block's in the teacher.
        hidden: of the teacher's hidden activations, with what the stream should get as targets.
        scale: of the outputs on their way to the stream, `[C]`, nowhere zero.
    """
    covariance, cross = hidden.covariance(), hidden.cross()
    kept = choose_neurons(covariance, regress(covariance, cross), mlp.fc1.out_features)
    weight = regress(covariance[kept][:, kept], cross[:, kept])
    with torch.no_grad():
        mlp.fc1.weight.copy_(own.fc1.weight[kept])
        mlp.fc1.bias.copy_(own.fc1.bias[kept])
        mlp.fc2.weight.copy_(weight / scale[:, None])
        mlp.fc2.bias.copy_((hidden.mean_target - weight @ hidden.mean[kept]) / scale)


def narrow_heads(attn: Any, own: Any, q: Moments, k: Moments, attended: Moments) -> None:
    """Set the queries, keys and values of an attention with narrow heads, in place; its projection is fitted later.

    Args:
        attn: the narrow attention.
        own: the block's in the teacher.
        q: queries of all heads side by side, `H·D` wide.
        k: keys, the same.
        attended: values, after the attention maps.
    """
    heads = attn.num_heads
    widths = [attn.qkv.out_features // heads, attn.proj.in_features // heads]
    qk, v = (widths[0] - widths[1]) // 2, widths[1]
    maps: list[list[Tensor]] = [[], [], []]
    dim = own.proj.in_features // heads
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        # a shift of all keys adds the same to all logits of a query: only their covariance counts
        q_root, q_inverse = roots((q.xx / q.count)[part, part])  # type: ignore[index]
        k_root, k_inverse = roots(k.covariance()[part, part])
        u, s, vt = torch.linalg.svd(q_root @ k_root)
        maps[0].append((s[:qk].sqrt()[:, None] * u[:, :qk].T) @ q_inverse)
        maps[1].append((s[:qk].sqrt()[:, None] * vt[:qk]) @ k_inverse)
        root, inverse = roots(attended.covariance()[part, part])
        u, s, _ = torch.linalg.svd(root @ own.proj.weight.double()[:, part].T, full_matrices=False)
        maps[2].append((s[:v].sqrt()[:, None] * u[:, :v].T) @ inverse)
    weight = own.qkv.weight.double().unflatten(0, (3, heads, dim))
    bias = own.qkv.bias.double().unflatten(0, (3, heads, dim))
    with torch.no_grad():
        attn.qkv.weight.copy_(torch.cat([maps[i][h] @ weight[i, h] for i in range(3) for h in range(heads)]))
        attn.qkv.bias.copy_(torch.cat([maps[i][h] @ bias[i, h] for i in range(3) for h in range(heads)]))


def fit_layer(layer: Any, inputs: Moments, scale: Tensor) -> None:
    """Set a linear layer to the best prediction of its targets, in place.

    Args:
        layer: with a bias.
        inputs: with what the stream should get as targets.
        scale: of the outputs on their way to the stream, `[C]`, nowhere zero.
    """
    weight = regress(inputs.covariance(), inputs.cross())
    with torch.no_grad():
        layer.weight.copy_(weight / scale[:, None])
        layer.bias.copy_((inputs.mean_target - weight @ inputs.mean) / scale)
