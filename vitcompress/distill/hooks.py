"""How are a model's inner values read?  By hooks on its named modules, so that its forward stays its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitcompress.families.base import Tap


def as_read(value: Tensor) -> Tensor:
    """Keep all of it."""
    return value


@contextmanager
def tap_outputs(
    model: nn.Module, taps: Sequence[Tap], keep: Callable[[Tensor], Tensor] = as_read
) -> Iterator[list[Tensor]]:
    """Collect what the taps read, in their order, until the context ends.

    Under activation checkpointing, blocks run a second time in the backward pass: what they give then is not kept, for
    it would hold on to all that checkpointing frees. `keep` runs again with it, since the second run must do what the
    first did.

    Args:
        model: its forward pass forgets what was read before.
        taps: by full module names; one module may have several.
        keep: what to keep of each value.

    Yields:
        A list, filled anew by each forward pass of `model`, one tensor per tap; empty until the first.
    """
    nothing = torch.empty(0)
    cells: list[list[Tensor]] = [[] for _ in taps]  # one each: what is compiled for one block then fits all like it
    seen: list[Tensor] = []

    def clear(module: nn.Module, inputs: Any) -> None:
        for cell in cells:
            cell.clear()
        seen.clear()

    def reader(cell: list[Tensor], tap: Tap) -> Callable[[nn.Module, Any, Tensor], None]:
        holder = model.get_submodule(tap.module if tap.holder is None else tap.holder)

        def read(module: nn.Module, inputs: Any, output: Tensor) -> None:
            value = keep(tap.read(holder, inputs, output))
            if not cell:
                cell.append(value)

        return read

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.extend(cell[0] for cell in cells)
        for cell in cells:
            cell[0] = nothing  # what was read is the list's alone, to be freed with it

    handles = [model.register_forward_pre_hook(clear), model.register_forward_hook(collect)]
    handles += [
        model.get_submodule(tap.module).register_forward_hook(reader(cell, tap))
        for cell, tap in zip(cells, taps, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class TokenSubset:
    """The same random tokens of every value of as many tokens, other ones after each `draw`.

    Relations grow with the square of the tokens: this is what bounds them. A copy of the chosen tokens is kept. Where
    most tokens are chosen and gradients flow through the value, autograd mostly has it already: then it is kept whole,
    and `choose` says which of its tokens are meant.

    Args:
        most: tokens to keep; values of fewer are left whole.
        seed: with the number of the draw, decides which.
    """

    def __init__(self, most: int, *, seed: int) -> None:
        self.most, self.seed = most, seed
        self.draw(0)

    def draw(self, number: int) -> None:
        """Choose other tokens from now on, in place."""
        self.generator_seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        self.chosen: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, value: Tensor) -> Tensor:
        """What to keep of `[B, N, C]`: the chosen tokens, `[B, n, C]`, in their order, or all of it."""
        chosen = self.choose(value.shape[1], value.device)
        if chosen is None or (value.requires_grad and value.shape[1] < 2 * self.most):
            return value
        return value.index_select(1, chosen)

    def choose(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """Numbers of the chosen ones of so many tokens, `[n]`, ascending; None where all are."""
        if num_tokens <= self.most:
            return None
        key = num_tokens, device
        if key not in self.chosen:
            generator = torch.Generator().manual_seed(self.generator_seed)
            with torch.inference_mode(False):  # the teacher may run in that mode, the student's gradients need it too
                order = torch.randperm(num_tokens, generator=generator)[: self.most].sort().values
                self.chosen[key] = order.to(device)
        return self.chosen[key]
