"""KL between the token relations of two models, computed with its gradient in small blocks.

Let S be the states of an image's tokens as rows (queries, keys and values: three parts stacked),
R = S Sᵀ/√d, and q (student) and p (teacher) the row softmaxes of R, separately for each pair of
parts. The gradient of KL(p || q) is (G + Gᵀ) S/√d per row, with G = q − p. R is symmetric: only the
pairs on and above its diagonal are multiplied, the others are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_BYTES = {"cpu": 2**20}  # size of the relations computed at once: what the cache holds
MAX_BYTES = 2**28  # the same on other devices, where larger products are faster

TokenChooser = Callable[[int, torch.device], Tensor | None]


def all_tokens(num_tokens: int, device: torch.device) -> Tensor | None:
    """Choose all tokens."""
    return None


def relation_kl(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, heads: int = 1, choose: TokenChooser = all_tokens
) -> Tensor:
    """KL(teacher || student) between the relations of all pairs of parts: softmax(S_i S_jᵀ/√d).

    Frees all relations before it returns; plain autograd would keep two per block until the
    backward pass.

    Args:
        student: the parts, `[B, N, C]` each.
        teacher: the same number of parts, of any width; no gradient flows into them.
        heads: number of heads of d channels that the width is split into, with one relation each.
        choose: `(number of tokens, device) -> indices [n]` of the tokens to relate; None for all.
            The teacher's parts may hold only these tokens already.

    Returns:
        Scalar `[]`, nats per row of a relation.
    """
    tokens = choose(student[0].shape[1], student[0].device)
    teacher_tokens = choose(teacher[0].shape[1], teacher[0].device)
    targets = (part.detach() for part in teacher)
    with torch.autocast(student[0].device.type, enabled=False):  # it would round products of float32 states
        kl: Tensor = _RelationKL.apply(heads, tokens, teacher_tokens, len(student), *student, *targets)
    return kl


class _RelationKL(torch.autograd.Function):
    """The divergence; keeps its gradient until the backward pass instead of the relations."""

    @staticmethod
    def forward(
        ctx: Any, heads: int, tokens: Tensor | None, teacher_tokens: Tensor | None, num_parts: int, *states: Tensor
    ) -> Tensor:
        student, teacher = states[:num_parts], states[num_parts:]
        exact = torch.promote_types(student[0].dtype, torch.float32)  # in half precision the softmax is noise
        batch, num_tokens = student[0].shape[0], student[0].shape[1] if tokens is None else len(tokens)
        rows = batch * heads * num_parts**2 * num_tokens
        grads = None
        if any(ctx.needs_input_grad):  # of the chosen tokens only
            grads = [part.new_empty(batch, num_tokens, part.shape[-1], dtype=exact) for part in student]
        memory: list[Tensor] = []
        total = torch.zeros((), dtype=torch.float64, device=student[0].device)
        for images in _images(batch, heads * (num_parts * num_tokens) ** 2 * exact.itemsize, student[0].device.type):
            student_rows = _stack_parts(student, images, heads, tokens, exact)
            teacher_rows = _stack_parts(teacher, images, heads, teacher_tokens, exact)
            if not memory:  # reused: only the last images may be fewer
                memory = [student_rows.new_empty(len(student_rows), *2 * [num_parts * num_tokens]) for _ in range(3)]
            buffers = [tensor[: len(student_rows)] for tensor in memory]
            value, grad = _divergence(student_rows, teacher_rows, num_parts, buffers, with_grad=grads is not None)
            total += value
            if grads is not None and grad is not None:
                grad = grad.mul_((student_rows.shape[-1] ** -0.25) / rows).unflatten(0, (-1, heads))
                parts = grad.transpose(1, 2).flatten(2).split(num_tokens, dim=1)
                for total_grad, part in zip(grads, parts, strict=True):
                    total_grad[images] = part
        if grads is not None:
            ctx.tokens, ctx.states = tokens, [(part.shape, part.dtype) for part in student]
            ctx.save_for_backward(*grads)
        return (total / rows).to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = []
        for grad, (shape, dtype) in zip(ctx.saved_tensors, ctx.states, strict=True):
            part = (grad * upstream).to(dtype)
            grads.append(part if ctx.tokens is None else part.new_zeros(shape).index_copy_(1, ctx.tokens, part))
        return (None, None, None, None, *grads, *[None] * len(grads))


def _images(batch: int, bytes_per_image: int, device: str) -> Iterator[slice]:
    """Yield slices of a batch whose relations fit the memory for this device."""
    count = max(1, BLOCK_BYTES.get(device, MAX_BYTES) // bytes_per_image)
    for first in range(0, batch, count):
        yield slice(first, min(batch, first + count))


def _stack_parts(
    parts: Sequence[Tensor], images: slice, heads: int, tokens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the stacked parts of some images, `[b·heads, P·n, d]`, times d^-¼.

    Products of these rows are divided by √d, as relations are.
    """
    chosen = [part[images] if tokens is None else part[images].index_select(1, tokens) for part in parts]
    rows = torch.cat(chosen, dim=1).to(dtype)
    if heads > 1:
        rows = rows.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)
    return rows.mul_(rows.shape[-1] ** -0.25)


def _divergence(
    student: Tensor, teacher: Tensor, num_parts: int, memory: Sequence[Tensor], *, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed divergence and (G + Gᵀ) S, or None without `with_grad`.

    Args:
        student: S, `[b, P·n, d]`, scaled.
        teacher: the teacher's S, `[b, P·n, d']`, scaled.
        num_parts: P.
        memory: three tensors `[b, P·n, P·n]` to write to.
        with_grad: whether to compute the gradient.
    """
    first, log_q, log_p = memory
    _log_softmax(student, num_parts, first, out=log_q)
    _log_softmax(teacher, num_parts, first, out=log_p)
    p = torch.exp(log_p, out=first)
    gap = log_p.sub_(log_q)
    value = torch.dot(p.flatten(), gap.flatten())
    if not with_grad:
        return value, None
    g = log_q.exp_().sub_(p)
    return value, torch.bmm(torch.add(g, g.mT, out=gap), student)


def _log_softmax(states: Tensor, num_parts: int, product: Tensor, *, out: Tensor) -> None:
    """Write the log softmax of each row of each part of S Sᵀ to `out`; overwrites `product`."""
    size = states.shape[1] // num_parts
    for top in range(0, states.shape[1], size):
        rows, rest = slice(top, top + size), slice(top, None)
        below = slice(top + size, None)
        product[:, rows, rest] = states[:, rows] @ states[:, rest].mT
        product[:, below, rows] = product[:, rows, below].mT
    shape = (num_parts, size)
    torch.log_softmax(product.unflatten(-1, shape), dim=-1, out=out.unflatten(-1, shape))
