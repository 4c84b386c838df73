"""Choose the neurons and channels that a narrow block keeps, and set its layers.

MLP     neurons are removed a few at a time, each time those that the others replace best (optimal
        brain surgeon on the second layer); then the second layer is fitted again
heads   q·k and P·v·proj are products of two maps: each is cut to its largest singular values,
        weighted by the second moments of its inputs; then the projection is fitted again
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitcompress.initialize.regression import Moments, regress, roots

ROUNDS = 32


def choose_neurons(covariance: Tensor, weight: Tensor, count: int) -> Tensor:
    """Choose the hidden neurons to keep.

    Args:
        covariance: covariance of the hidden activations, `[M, M]`, invertible.
        weight: weight of the layer after them, `[C, M]`.
        count: number of neurons to keep.

    Returns:
        Their indices `[count]`, ascending.

    Source: Hassibi and Stork 1993, optimal brain surgeon; for neurons, Frantar and Alistarh 2022,
        arXiv:2208.11580.
    """
    kept = torch.arange(len(covariance), device=covariance.device)
    inverse = torch.linalg.inv(covariance)
    # one by one chooses no better, and takes minutes at width 3072
    for rounds_left in range(ROUNDS, 0, -1):
        cost = weight.square().sum(0) / inverse.diagonal()
        removed = cost.argsort(stable=True)[: -(-(len(kept) - count) // rounds_left)]
        if not len(removed):
            break
        rest = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        rest[removed] = False
        # the inverse without the removed inputs is a Schur complement
        solved = torch.linalg.solve(inverse[removed][:, removed], inverse[removed][:, rest])
        weight = weight[:, rest] - weight[:, removed] @ solved
        inverse = inverse[rest][:, rest] - inverse[rest][:, removed] @ solved
        kept = kept[rest]
    return kept


def narrow_mlp(mlp: Any, teacher_mlp: Any, hidden: Moments, scale: Tensor) -> None:
    """Set a narrow MLP, in place.

    Args:
        mlp: timm's `Mlp`, narrow.
        teacher_mlp: the MLP of the teacher's block.
        hidden: moments of the teacher's hidden activations; targets are additions to the stream.
        scale: LayerScale after the MLP, `[C]`, nowhere zero.
    """
    covariance, cross = hidden.covariance(), hidden.cross()
    kept = choose_neurons(covariance, regress(covariance, cross), mlp.fc1.out_features)
    weight = regress(covariance[kept][:, kept], cross[:, kept])
    with torch.no_grad():
        mlp.fc1.weight.copy_(teacher_mlp.fc1.weight[kept])
        mlp.fc1.bias.copy_(teacher_mlp.fc1.bias[kept])
        mlp.fc2.weight.copy_(weight / scale[:, None])
        mlp.fc2.bias.copy_((hidden.mean_target - weight @ hidden.mean[kept]) / scale)


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
    maps: list[list[Tensor]] = [[], [], []]
    dim = teacher_attn.proj.in_features // heads
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        # shifting all keys adds a constant to the logits of a query: only their covariance counts
        q_root, q_inverse = roots((q.xx / q.count)[part, part])
        k_root, k_inverse = roots(k.covariance()[part, part])
        u, s, vt = torch.linalg.svd(q_root @ k_root)
        maps[0].append((s[:qk].sqrt()[:, None] * u[:, :qk].T) @ q_inverse)
        maps[1].append((s[:qk].sqrt()[:, None] * vt[:qk]) @ k_inverse)
        root, inverse = roots(attended.covariance()[part, part])
        u, s, _ = torch.linalg.svd(root @ teacher_attn.proj.weight.double()[:, part].T, full_matrices=False)
        maps[2].append((s[:v].sqrt()[:, None] * u[:, :v].T) @ inverse)
    weight = teacher_attn.qkv.weight.double().unflatten(0, (3, heads, dim))
    bias = teacher_attn.qkv.bias.double().unflatten(0, (3, heads, dim))
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
