"""How far apart are the relations between tokens of two models?  A few images at a time, with the gradient at once.

With S the states of an image's tokens below each other (of queries, keys and values: three parts), R = S Sᵀ/√d, and row
softmaxes q (student) and p (teacher) of every part against every part, the gradient of KL(p || q) is (G + Gᵀ) S/√d per
row, G = q − p. R is symmetric, so only the parts on and above its diagonal are multiplied, and the rest is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_BYTES = {"cpu": 2**20}  # of the relations of a few images: what the cache holds
MOST_BYTES = 2**28  # elsewhere, where larger products are faster

Choice = Callable[[int, torch.device], Tensor | None]


def all_tokens(num_tokens: int, device: torch.device) -> Tensor | None:
    """No choice."""
    return None


def relation_kl(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, heads: int = 1, choose: Choice = all_tokens
) -> Tensor:
    """KL(teacher || student) between the relations of every part with every part: row softmaxes of S_i S_jᵀ/√d.

    No relation outlives the call: plain autograd would keep two per block of the model until the backward pass.

    Args:
        student: the parts, `[B, N, C]` each.
        teacher: as many parts, of any width; no gradient flows into them.
        heads: the width is cut into as many parts of d channels; a relation each.
        choose: `(number of tokens, device) -> numbers [n]` of the tokens to relate; None for all. Of the teacher,
            tokens may have been left out already.

    Returns:
        Scalar `[]`, nats per row of a relation.
    """
    tokens = choose(student[0].shape[1], student[0].device)
    taught = choose(teacher[0].shape[1], teacher[0].device)
    targets = (part.detach() for part in teacher)
    with torch.autocast(student[0].device.type, enabled=False):  # it would round the products of what is in float32
        kl: Tensor = _RelationKL.apply(heads, tokens, taught, len(student), *student, *targets)
    return kl


class _RelationKL(torch.autograd.Function):
    """The divergence, and what its gradient is, kept until the backward pass in the place of the relations."""

    @staticmethod
    def forward(
        ctx: Any, heads: int, tokens: Tensor | None, taught: Tensor | None, num_parts: int, *states: Tensor
    ) -> Tensor:
        student, teacher = states[:num_parts], states[num_parts:]
        exact = torch.promote_types(student[0].dtype, torch.float32)  # in half precision such a softmax is noise
        batch, num_tokens = student[0].shape[0], student[0].shape[1] if tokens is None else len(tokens)
        rows = batch * heads * num_parts**2 * num_tokens
        grads = None
        if any(ctx.needs_input_grad):  # of the chosen tokens: the others have none
            grads = [part.new_empty(batch, num_tokens, part.shape[-1], dtype=exact) for part in student]
        relations = _Relations(num_parts)
        total = torch.zeros((), dtype=torch.float64, device=student[0].device)
        for images in _images(batch, heads * (num_parts * num_tokens) ** 2 * exact.itemsize, student[0].device.type):
            ours = _below_each_other(student, images, heads, tokens, exact)
            theirs = _below_each_other(teacher, images, heads, taught, exact)
            value, grad = relations.compare(ours, theirs, with_grad=grads is not None)
            total += value
            if grads is not None and grad is not None:
                grad = grad.mul_((ours.shape[-1] ** -0.25) / rows).unflatten(0, (-1, heads))
                parts = grad.transpose(1, 2).flatten(2).split(num_tokens, dim=1)
                for whole, part in zip(grads, parts, strict=True):
                    whole[images] = part
        if grads is not None:
            ctx.tokens, ctx.states = tokens, [(part.shape, part.dtype) for part in student]
            ctx.save_for_backward(*grads)
        return (total / rows).to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = []
        for grad, (shape, dtype) in zip(ctx.saved_tensors, ctx.states, strict=True):
            part = (grad * upstream).to(dtype)
            found.append(part if ctx.tokens is None else part.new_zeros(shape).index_copy_(1, ctx.tokens, part))
        return (None, None, None, None, *found, *[None] * len(found))


def _images(batch: int, bytes_per_image: int, device: str) -> Iterator[slice]:
    """Slices of a batch whose relations are no larger than they should be at once."""
    count = max(1, BLOCK_BYTES.get(device, MOST_BYTES) // bytes_per_image)
    for first in range(0, batch, count):
        yield slice(first, min(batch, first + count))


def _below_each_other(
    parts: Sequence[Tensor], images: slice, heads: int, tokens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The parts of some images, times d^-¼: `[b·heads, P·n, d]`; products of them are divided by √d."""
    chosen = [part[images] if tokens is None else part[images].index_select(1, tokens) for part in parts]
    rows = torch.cat(chosen, dim=1).to(dtype)
    if heads > 1:
        rows = rows.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)
    return rows.mul_(rows.shape[-1] ** -0.25)


class _Relations:
    """Relations of some images after another's, in the same memory.

    Args:
        num_parts: P.
    """

    def __init__(self, num_parts: int) -> None:
        self.num_parts = num_parts
        self.memory: tuple[Tensor, Tensor, Tensor] | None = None

    def compare(self, student: Tensor, teacher: Tensor, *, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        """The summed divergence, and (G + Gᵀ) S.

        Args:
            student: S, `[b, P·n, d]`, scaled.
            teacher: `[b, P·n, d']`, scaled.
            with_grad: else there is none.
        """
        first, log_q, log_p = self._memory(student)
        self._log_softmax(student, first, out=log_q)
        self._log_softmax(teacher, first, out=log_p)
        p = torch.exp(log_p, out=first)
        gap = log_p.sub_(log_q)
        value = torch.dot(p.flatten(), gap.flatten())
        if not with_grad:
            return value, None
        g = log_q.exp_().sub_(p)
        return value, torch.bmm(torch.add(g, g.mT, out=gap), student)

    def _memory(self, student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = len(student), student.shape[1], student.shape[1]
        if self.memory is None or self.memory[0].shape != size:
            first, second, third = (student.new_empty(size) for _ in range(3))
            self.memory = first, second, third
        return self.memory

    def _log_softmax(self, states: Tensor, product: Tensor, *, out: Tensor) -> None:
        """Log softmax of each row of each part of S Sᵀ, in place of `out`; `product` is overwritten."""
        size = states.shape[1] // self.num_parts
        for top in range(0, states.shape[1], size):
            rows, rest = slice(top, top + size), slice(top, None)
            below = slice(top + size, None)
            product[:, rows, rest] = states[:, rows] @ states[:, rest].mT
            product[:, below, rows] = product[:, rows, below].mT
        shape = (self.num_parts, size)
        torch.log_softmax(product.unflatten(-1, shape), dim=-1, out=out.unflatten(-1, shape))
