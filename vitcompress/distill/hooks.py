"""Read a model's inner values through hooks, without changing its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitcompress.distill.losses import QKV, Outputs
from vitcompress.distill.relations import all_tokens
from vitcompress.families.base import Tap
from vitcompress.families.insertion import layers_called


@dataclass(frozen=True)
class ReadPoints:
    """Where a model is read for the losses.

    Attributes:
        blocks: full names of the blocks to read.
        qkv: taps of q, k and v, one tuple per block; empty if no loss needs them.
    """

    blocks: tuple[str, ...] = ()
    qkv: tuple[tuple[Tap, ...], ...] = ()


class TokenSubset:
    """Choose random tokens: the same in all tensors with as many tokens, new ones after `draw`.

    Relations grow with the square of the number of tokens, so this bounds them. Normally a copy of
    the chosen tokens is kept. If most tokens are chosen and gradients flow through the tensor,
    autograd usually keeps it anyway; then it is kept as it is, and `choose` tells which of its
    tokens to use.

    Args:
        max_tokens: number of tokens to keep; tensors with fewer are kept as they are.
        seed: determines the tokens, together with the number of the draw.
    """

    def __init__(self, max_tokens: int, *, seed: int) -> None:
        self.max_tokens, self.seed = max_tokens, seed
        self.draw(0)

    def draw(self, number: int) -> None:
        """Choose other tokens from now on, in place."""
        self.generator_seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        self.chosen: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, value: Tensor) -> Tensor:
        """Return the chosen tokens of `[B, N, C]`, in order, as `[B, n, C]`, or `value` itself."""
        chosen = self.choose(value.shape[1], value.device)
        if chosen is None or (value.requires_grad and value.shape[1] < 2 * self.max_tokens):
            return value
        return value.index_select(1, chosen)

    def choose(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """Return the indices of the chosen tokens, `[n]`, ascending; None if all are chosen."""
        if num_tokens <= self.max_tokens:
            return None
        key = num_tokens, device
        if key not in self.chosen:
            generator = torch.Generator().manual_seed(self.generator_seed)
            # not an inference tensor, even if the teacher asks first: the student needs gradients
            with torch.inference_mode(False):
                order = torch.randperm(num_tokens, generator=generator)[: self.max_tokens].sort().values
                self.chosen[key] = order.to(device)
        return self.chosen[key]


def keep_all(value: Tensor) -> Tensor:
    """Return `value` itself."""
    return value


@contextmanager
def tap_outputs(
    model: nn.Module, taps: Sequence[Tap], keep: Callable[[Tensor], Tensor] = keep_all
) -> Iterator[list[Tensor]]:
    """Collect the values at `taps`, in their order, until the context ends.

    With activation checkpointing, blocks run a second time in the backward pass. Values of that
    second run are not collected: they would hold the memory that checkpointing frees. `keep` runs
    again all the same, because the second run must do what the first did.

    Args:
        model: each of its forward passes drops the values of the previous one.
        taps: by full module names; a module may have several.
        keep: returns the part of a value to keep.

    Yields:
        A list with one tensor per tap, refilled by each forward pass; empty before the first.
    """
    nothing = torch.empty(0)
    cells: list[list[Tensor]] = [[] for _ in taps]  # one per tap, so that code compiled for one block fits the others
    values: list[Tensor] = []

    def clear(module: nn.Module, inputs: Any) -> None:
        for cell in cells:
            cell.clear()
        values.clear()

    def reader(cell: list[Tensor], tap: Tap) -> Callable[[nn.Module, Any, Tensor], None]:
        holder = model.get_submodule(tap.module if tap.holder is None else tap.holder)

        def read(module: nn.Module, inputs: Any, output: Tensor) -> None:
            value = keep(tap.read(holder, inputs, output))
            if not cell:
                cell.append(value)

        return read

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        values.extend(cell[0] for cell in cells)
        for cell in cells:
            cell[0] = nothing  # only the list holds the values, so clearing it frees them

    handles = [model.register_forward_pre_hook(clear), model.register_forward_hook(collect)]
    handles += [
        model.get_submodule(tap.module).register_forward_hook(reader(cell, tap))
        for cell, tap in zip(cells, taps, strict=True)
    ]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reading_outputs(
    model: nn.Module, points: ReadPoints, fields: Set[str], tokens: TokenSubset | None = None
) -> Iterator[Callable[[Tensor], Outputs]]:
    """Read a model's forward passes until the context ends.

    The values of a pass are handed out once and not kept: a teacher's are freed before the
    student's backward pass.

    Args:
        model: the model that `points` belongs to.
        points: where to read it.
        fields: fields of `Outputs` to read; the others stay empty.
        tokens: tokens that relations are computed of; None for all.

    Yields:
        A function that takes the logits of the last forward pass and returns its `Outputs`.
    """
    blocks = [Tap(name) for name in points.blocks]
    keep = tokens or keep_all
    with ExitStack() as stack:
        if "qkv" in fields:
            stack.enter_context(layers_called(model))

        def tapped(field: str, taps: Sequence[Tap], keep: Callable[[Tensor], Tensor] = keep_all) -> list[Tensor]:
            return stack.enter_context(tap_outputs(model, taps, keep)) if field in fields else []

        hidden = tapped("hidden", blocks)
        sampled = tapped("sampled", blocks, lambda states: keep(states.flatten(1, -2)))
        qkv = tapped("qkv", [tap for taps in points.qkv for tap in taps], keep)

        def hand_out(logits: Tensor) -> Outputs:
            choose = tokens.choose if tokens else all_tokens
            outputs = Outputs(logits, list(hidden), list(sampled), _split_qkv(qkv, points), choose)
            for values in (hidden, sampled, qkv):
                values.clear()
            return outputs

        yield hand_out


def _split_qkv(values: Sequence[Tensor], points: ReadPoints) -> list[QKV]:
    """Return q, k and v of each block from the values of its one or three taps."""
    triples, rest = [], iter(values)
    for taps in points.qkv if values else ():
        parts = [next(rest) for _ in taps]
        q, k, v = parts if len(parts) > 1 else parts[0].chunk(3, dim=-1)
        triples.append((q, k, v))
    return triples
