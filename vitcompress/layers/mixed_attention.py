"""Attention whose maps are mixed across heads, computed in blocks that fit the cache.

    S = c Q Kᵀ + bias     L = A S + mask     P = softmax(L)     out = (B P) V      A, B mix heads

Fused kernels cannot mix heads. The maps of a whole batch are many times larger than the processor's
cache, and each of the steps above would read and write them all; here a block of maps goes through
all steps before the next one starts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_BYTES = 2**20  # size of a block of maps; the best of 2^18 to 2^22, with 2^21: docs/benchmarks.md


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, mix_logits: Tensor | None, mix_probs: Tensor | None, *,
    scale: float = 1.0, bias: Tensor | None = None, mask: Tensor | None = None, drop: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention with its maps mixed across heads before and after the softmax.

    The mask is added after the first mix, because masked positions must stay masked. A position
    bias belongs to the logits of its head and is added before. A mix that is the identity and is
    not trained is skipped. No map is kept for the backward pass: it computes them again.

    Args:
        q: queries `[B, H, N, D]`.
        k: keys `[B, H, M, D]`.
        v: values `[B, H, M, V]`.
        mix_logits: A, `[H, H]`; None for the identity.
        mix_probs: B, `[H, H]`; None for the identity.
        scale: c, factor of the products; scaling queries instead would keep a second copy of them.
        bias: added to the logits, `[B or 1, H or 1, N, M]` or `[H, N, M]`.
        mask: added to the mixed logits, `[B or 1, H or 1, N, M]` or `[N, M]`.
        drop: share of the mixed probabilities to drop, 0–1.

    Returns:
        `[B, H, N, V]`.

    Source: MiniViT, arXiv:2204.07154, Sec. 3.2; order of bias, mix and mask as in the released
        Mini-Swin.
    """
    if not _in_blocks(q, drop):
        return attend_whole(q, k, v, mix_logits, mix_probs, scale=scale, bias=bias, mask=mask, drop=drop)
    mix_logits, mix_probs = _drop_identity(mix_logits), _drop_identity(mix_probs)
    if mix_logits is None and mix_probs is None:
        terms = [_expand_heads(term, q, k) for term in (bias, mask) if term is not None]
        total = terms[0] + terms[1] if len(terms) == 2 else terms[0] if terms else None
        fused: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=total, scale=scale)
        return fused
    inputs = (q, k, v, mix_logits, mix_probs, bias, mask)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _attend_recomputed(*inputs, scale)
    return _attend_in_blocks(*inputs, scale)


def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, mix_logits: Tensor | None, mix_probs: Tensor | None, *,
    scale: float = 1.0, bias: Tensor | None = None, mask: Tensor | None = None, drop: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute attention with mixed heads by plain operations on whole maps.

    Used for other devices, mixed precision, dropout, tracing and export, and to train on a few
    images at a time. Arguments and result are those of `mixed_attention`.
    """
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
    """Compute `out[g] = Σ_h weight[g, h] · in[h]` for maps `[B, H, N, M]` and `weight` `[H, H]`.

    One product per image: an einsum would copy the maps to bring the heads to the front, and the
    1×1 convolution of the released code is about twenty times slower on CPU.
    """
    mixed = torch.bmm(weight.expand(maps.shape[0], -1, -1), maps.flatten(2))  # len() would fix the batch size
    return mixed.view(maps.shape)


def _in_blocks(q: Tensor, drop: float) -> bool:
    """Return whether blocks can be used and pay off: on CPU, with its small caches."""
    return (
        q.device.type == "cpu"
        and not drop
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch.is_autocast_enabled("cpu")
    )


def _drop_identity(weight: Tensor | None) -> Tensor | None:
    """Return None for a mix that changes nothing and gets no gradient, else the mix."""
    if weight is None or (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    return None if torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) else weight


def _attend_recomputed(
    q: Tensor, k: Tensor, v: Tensor, mix_logits: Tensor | None, mix_probs: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Attend for training: a few images at a time, with maps recomputed in the backward pass."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        return attend_whole(q, k, v, mix_logits, mix_probs, scale=scale, bias=bias, mask=mask)

    batch, heads, queries, _ = q.shape
    images = max(1, BLOCK_BYTES // (heads * queries * k.shape[2] * q.element_size()))
    num_parts = -(-batch // images)
    columns = [
        [term] * num_parts if term is None or term.ndim < 4 or len(term) == 1 else term.split(images)
        for term in (q, k, v, bias, mask)
    ]
    parts = [
        checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)
        for inputs in zip(*columns, strict=True)
    ]
    return torch.cat(parts)


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, mix_logits: Tensor | None, mix_probs: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Attend for inference: block after block, in the same memory."""
    bias, mask = (None if term is None else _expand_heads(term, q, k) for term in (bias, mask))
    memory: dict[tuple[str, torch.Size], Tensor] = {}

    def empty(name: str, shape: torch.Size) -> Tensor:
        if (name, shape) not in memory:
            memory[name, shape] = torch.empty(shape, dtype=q.dtype)
        return memory[name, shape]

    def mix(maps: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return maps
        mixed = empty("mixed", maps.shape)
        torch.bmm(weight.expand(len(maps), -1, -1), maps.flatten(2), out=mixed.flatten(2))
        return mixed

    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)  # laid out as the projection reads it
    for images, rows in _blocks(q, k.shape[2]):
        block_q, block_k = q[images, :, rows], k[images]
        logits = empty("logits", torch.Size((*block_q.shape[:3], k.shape[2])))
        flat = logits.flatten(0, 1)
        torch.baddbmm(flat, block_q.flatten(0, 1), block_k.flatten(0, 1).mT, beta=0, alpha=scale, out=flat)
        if bias is not None:
            logits += _select(bias, images, rows)
        mixed = mix(logits, mix_logits)
        if mask is not None:
            mixed += _select(mask, images, rows)
        probs = torch.softmax(mixed, dim=-1, out=empty("probs", mixed.shape))
        mixed_probs = mix(probs, mix_probs)  # overwrites the mixed logits, which are no longer needed
        attended = torch.bmm(mixed_probs.flatten(0, 1), v[images].flatten(0, 1))
        out[images, :, rows] = attended.unflatten(0, probs.shape[:2])
    return out


def _expand_heads(term: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Expand a bias or mask to `[B or 1, H, N, M]`."""
    return term.expand(len(term) if term.ndim == 4 else 1, *q.shape[1:3], k.shape[2])


def _select(term: Tensor, images: slice, rows: slice) -> Tensor:
    """Return a block's part of a bias or mask; one for all images has no batch to select from."""
    return term[images if len(term) > 1 else slice(None), :, rows]


def _blocks(q: Tensor, num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of images (or windows) and of their queries whose maps fit the cache."""
    batch, heads, queries, _ = q.shape
    row_bytes = heads * num_keys * q.element_size()
    rows = min(queries, max(1, BLOCK_BYTES // row_bytes))
    rows = -(-queries // -(-queries // rows))  # blocks of similar size
    images = max(1, BLOCK_BYTES // (row_bytes * queries))
    for first in range(0, batch, images):
        for top in range(0, queries, rows):
            yield slice(first, min(batch, first + images)), slice(top, min(queries, top + rows))
