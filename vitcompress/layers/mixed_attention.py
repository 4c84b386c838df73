"""How is attention computed whose maps are mixed across heads?  A few maps at a time, which never leave the cache.

    S = c Q Kᵀ + bias      L = A S + mask      P = softmax(L)      out = (B P) V        A, B mix heads

Fused kernels cannot mix heads. Whole maps of a batch are many times as large as the processor's cache, and each of
the steps above would read and write them all; a block of them goes through all steps before the next one is begun.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_BYTES = 2**20  # of one block of maps; the best of 2^18 to 2^22, with the next: docs/benchmarks.md


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, mix_logits: Tensor | None, mix_probs: Tensor | None, *,
    scale: float = 1.0, bias: Tensor | None = None, mask: Tensor | None = None, drop: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention with its maps mixed across heads before and after the softmax.

    The mask comes after the first mix: masked places must stay masked whatever the mix is. A position bias belongs to
    the head's own logits and comes before it. Gradients are computed from maps that are computed anew, so none is
    kept; they cannot be differentiated once more. A mix that is the identity, and is not being learned, is left out.

    Args:
        q: queries `[B, H, N, D]`.
        k: keys `[B, H, M, D]`.
        v: values `[B, H, M, V]`.
        mix_logits: A, `[H, H]`; None for the identity.
        mix_probs: B, `[H, H]`; None for the identity.
        scale: c, of the products; queries scaled before would be a second copy to keep for the backward pass.
        bias: added to the logits, `[B or 1, H or 1, N, M]` or `[H, N, M]`.
        mask: added to the mixed logits, `[B or 1, H or 1, N, M]`.
        drop: share of the mixed probabilities that are dropped, 0–1.

    Returns:
        `[B, H, N, V]`.

    Source: MiniViT, arXiv:2204.07154, Sec. 3.2; order of bias, mix and mask as in the released Mini-Swin.
    """
    if not _in_blocks(q, drop):
        return attend_whole(q, k, v, mix_logits, mix_probs, scale=scale, bias=bias, mask=mask, drop=drop)
    mix_logits, mix_probs = _without_identity(mix_logits), _without_identity(mix_probs)
    added = [_with_heads(term, q, k) for term in (bias, mask)]
    if mix_logits is None and mix_probs is None:
        terms = [term for term in added if term is not None]
        total = terms[0] + terms[1] if len(terms) == 2 else terms[0] if terms else None
        fused: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=total, scale=scale)
        return fused
    out: Tensor = _MixedAttention.apply(scale, q, k, v, mix_logits, mix_probs, *added)
    return out


def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, mix_logits: Tensor | None, mix_probs: Tensor | None, *,
    scale: float = 1.0, bias: Tensor | None = None, mask: Tensor | None = None, drop: float = 0.0,
) -> Tensor:  # fmt: skip
    """The same by plain operations on whole maps: for other devices, mixed precision, dropout, tracing and export."""
    logits = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    if mix_logits is not None:
        logits = mix_heads(logits, mix_logits)
    if mask is not None:
        logits = logits + mask
    probs = logits.softmax(dim=-1)
    if mix_probs is not None:
        probs = mix_heads(probs, mix_probs)
    return F.dropout(probs, drop) @ v if drop else probs @ v


def mix_heads(maps: Tensor, weight: Tensor) -> Tensor:
    """`out[g] = Σ_h weight[g, h] · in[h]` of maps `[B, H, N, M]`, `weight` `[H, H]`.

    One product per image: an einsum would bring the heads to the front, and copy the maps for it; the 1×1 convolution
    of the released code is some twenty times slower on CPU.
    """
    mixed = torch.bmm(weight.expand(maps.shape[0], -1, -1), maps.flatten(2))  # len() would fix the batch
    return mixed.view(maps.shape)


def _in_blocks(q: Tensor, drop: float) -> bool:
    """Whether blocks are worth it: on CPU, where caches are small and launches cheap; and can be done."""
    return (
        q.device.type == "cpu"
        and not drop
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch.is_autocast_enabled("cpu")
    )


def _without_identity(weight: Tensor | None) -> Tensor | None:
    """None for a mix that changes nothing and gets no gradient."""
    if weight is None or (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    return None if torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) else weight


def _with_heads(term: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A bias or mask as `[B or 1, H, N, M]`."""
    if term is None:
        return None
    return term.expand(len(term) if term.ndim == 4 else 1, *q.shape[1:3], k.shape[2])


Block = tuple[slice, slice]


def _of_block(term: Tensor, block: Block) -> Tensor:
    """What of a bias or mask, or of its gradient, belongs to a block: the same for all images where it has but one."""
    images, rows = block
    return term[images if len(term) > 1 else slice(None), :, rows]


def _blocks(q: Tensor, num_keys: int) -> Iterator[Block]:
    """Slices of images, or windows, and of their queries whose maps fit the cache."""
    batch, heads, queries, _ = q.shape
    row = heads * num_keys * q.element_size()
    rows = min(queries, max(1, BLOCK_BYTES // row))
    rows = -(-queries // -(-queries // rows))  # as even as can be
    images = max(1, BLOCK_BYTES // (row * queries))
    for first in range(0, batch, images):
        for top in range(0, queries, rows):
            yield slice(first, min(batch, first + images)), slice(top, min(queries, top + rows))


class _Maps:
    """The maps of one block after another, in the same memory.

    Args:
        scale: of the products of queries and keys.
        q: queries of the batch.
        k: keys of the batch.
        weights: of the two mixes; None for the identity.
        added: bias and mask of the whole batch, or None.
    """

    def __init__(
        self, scale: float, q: Tensor, k: Tensor, weights: tuple[Tensor | None, ...], added: tuple[Tensor | None, ...]
    ) -> None:
        self.scale, self.q, self.k, self.weights, self.added = scale, q, k, weights, added
        self.memory: dict[tuple[str, torch.Size], Tensor] = {}

    def empty(self, name: str, shape: torch.Size) -> Tensor:
        """Memory of a shape, the same one each time."""
        if (name, shape) not in self.memory:
            self.memory[name, shape] = torch.empty(shape, dtype=self.q.dtype)
        return self.memory[name, shape]

    def mixed(self, maps: Tensor, weight: Tensor | None, name: str) -> Tensor:
        """Maps `[b, H, n, M]` mixed, in memory of their own; or as they are."""
        if weight is None:
            return maps
        out = self.empty(name, maps.shape)
        torch.bmm(weight.expand(len(maps), -1, -1), maps.flatten(2), out=out.flatten(2))
        return out

    def compute(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Logits with their bias, probabilities, and mixed probabilities, `[b, H, n, M]`: valid until the next call.

        Where no mix is computed, the first is not valid, or the last two are one.
        """
        images, rows = block
        q, k = self.q[images, :, rows], self.k[images]
        logits = self.empty("logits", torch.Size((*q.shape[:3], k.shape[2])))
        flat = logits.flatten(0, 1)
        torch.baddbmm(flat, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=self.scale, out=flat)
        bias, mask = (None if term is None else _of_block(term, block) for term in self.added)
        if bias is not None:
            logits += bias
        mixed = self.mixed(logits, self.weights[0], "mixed")
        if mask is not None:
            mixed += mask
        probs = self.empty("probs", mixed.shape)
        torch.softmax(mixed, dim=-1, out=probs)
        return logits, probs, self.mixed(probs, self.weights[1], "mixed")  # over the mixed logits: they are done with


class _MixedAttention(torch.autograd.Function):
    """Forward and backward in blocks; nothing but the inputs is kept between them."""

    @staticmethod
    def forward(
        ctx: Any, scale: float, q: Tensor, k: Tensor, v: Tensor, mix_logits: Tensor | None,
        mix_probs: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, mix_logits, mix_probs, bias, mask)
        maps = _Maps(scale, q, k, (mix_logits, mix_probs), (bias, mask))
        batch, heads, queries, _ = q.shape
        out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)  # as the projection reads it
        for images, rows in _blocks(q, k.shape[2]):
            probs = maps.compute((images, rows))[2]
            found = torch.bmm(probs.flatten(0, 1), v[images].flatten(0, 1))
            out[images, :, rows] = found.unflatten(0, probs.shape[:2])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mix_logits, mix_probs, bias, mask = ctx.saved_tensors
        maps = _Maps(ctx.scale, q, k, (mix_logits, mix_probs), (bias, mask))
        grads = _Gradients(q, k, v, (mix_logits, mix_probs), bias, mask, ctx.needs_input_grad[1:])
        for block in _blocks(q, k.shape[2]):
            grads.add(block, maps, upstream)
        return None, *grads.found(ctx.scale)


class _Gradients:
    """Gradients of all that a mixed attention was given, summed up block by block."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor | None, ...], bias: Tensor | None,
        mask: Tensor | None, needed: tuple[bool, ...],
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.weights = q, k, v, weights
        self.grad_q, self.grad_k, self.grad_v = (_zeros_like_heads(t) for t in (q, k, v))
        self.grad_weights = [
            torch.zeros_like(weight) if weight is not None and needed[3 + number] else None
            for number, weight in enumerate(weights)
        ]
        self.grad_added = [
            term.new_zeros(term.shape) if term is not None and need else None
            for term, need in ((bias, needed[5]), (mask, needed[6]))
        ]

    def add(self, block: Block, maps: _Maps, upstream: Tensor) -> None:
        """Add what one block gives, in place."""
        images, rows = block
        logits, probs, mixed = maps.compute(block)
        shape, num_heads = mixed.shape, mixed.shape[1]
        above = upstream[images, :, rows].flatten(0, 1)
        values = self.v[images].flatten(0, 1)
        self.grad_v[images] += torch.bmm(mixed.flatten(0, 1).mT, above).unflatten(0, (-1, num_heads))
        grad = maps.empty("grad", shape)
        torch.bmm(above, values.mT, out=grad.flatten(0, 1))
        grad = self._unmix(1, grad, probs, maps)
        grad = torch.ops.aten._softmax_backward_data(grad, probs, -1, grad.dtype)
        self._add_to_term(1, grad, block)
        grad = self._unmix(0, grad, logits, maps)
        self._add_to_term(0, grad, block)
        flat = grad.flatten(0, 1)
        self.grad_q[images, :, rows] = torch.bmm(flat, self.k[images].flatten(0, 1)).unflatten(0, shape[:2])
        self.grad_k[images] += torch.bmm(flat.mT, self.q[images, :, rows].flatten(0, 1)).unflatten(0, shape[:2])

    def _add_to_term(self, which: int, grad: Tensor, block: Block) -> None:
        total = self.grad_added[which]
        if total is not None:
            part = _of_block(total, block)
            part += grad if len(part) == len(grad) else grad.sum(0, keepdim=True)

    def _unmix(self, which: int, grad: Tensor, before: Tensor, maps: _Maps) -> Tensor:
        """The gradient of maps before a mix, from that after it; adds the mix's own."""
        weight, own = self.weights[which], self.grad_weights[which]
        if weight is None:
            return grad
        if own is not None:
            own += torch.bmm(grad.flatten(2), before.flatten(2).mT).sum(0)
        return maps.mixed(grad, weight.mT, "unmixed")

    def found(self, scale: float) -> tuple[Tensor | None, ...]:
        """In the order of the tensors; `scale` is that of the products of queries and keys."""
        self.grad_q *= scale
        self.grad_k *= scale
        return (self.grad_q, self.grad_k, self.grad_v, *self.grad_weights, *self.grad_added)


def _zeros_like_heads(heads: Tensor) -> Tensor:
    """Zeros `[B, H, N, D]` that lie in memory as `[B, N, H, D]`, for the gradient of what they were split from."""
    batch, num, tokens, dim = heads.shape
    return heads.new_zeros(batch, tokens, num, dim).transpose(1, 2)
