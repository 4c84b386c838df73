"""How are a model's inner values read?  By hooks on its named modules, so that its forward stays its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def tap_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect what the named modules return, in the order in which they run, until the context ends.

    Args:
        model: its forward pass clears the list first.
        names: full module names.

    Yields:
        A list, filled anew by each forward pass of `model`, one tensor per name.
    """
    seen: list[Tensor] = []

    def clear(module: nn.Module, inputs: Any) -> None:
        seen.clear()

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output)

    handles = [model.register_forward_pre_hook(clear)]
    handles += [model.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
