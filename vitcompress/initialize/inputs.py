"""Record what modules receive and return while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn


class Call(NamedTuple):
    """One forward pass of a module.

    Attributes:
        args: positional arguments; the first is the input.
        kwargs: keyword arguments.
        output: what the module returned.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def input(self) -> Tensor:
        """The first argument."""
        tensor: Tensor = self.args[0]
        return tensor


class BlockInput(NamedTuple):
    """Arguments of a block's forward pass.

    Attributes:
        x: residual stream `[B, ..., C]`.
        args: the other positional arguments.
        kwargs: keyword arguments.
    """

    x: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@contextmanager
def recording(model: nn.Module, names: Iterable[str], record: Callable[[str, Call], None]) -> Iterator[None]:
    """Pass every forward pass of some modules to `record`, until the context ends.

    Args:
        model: contains the modules.
        names: full names of the modules.
        record: called with a module's name and the call, after the forward pass.
    """
    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(partial(_record, record, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _record(
    record: Callable[[str, Call], None], name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    """Forward hook of one module."""
    record(name, Call(args, kwargs, output))


def run_block(block: nn.Module, given: BlockInput, names: Iterable[str] = ()) -> tuple[dict[str, Call], Tensor]:
    """Run a block as its class does, even where its own `forward` is replaced.

    Args:
        block: any block.
        given: its arguments.
        names: modules inside the block to record.

    Returns:
        The calls of these modules, by name, and the block's output `[B, ..., C]`.
    """
    calls: dict[str, Call] = {}
    with recording(block, names, calls.__setitem__):
        output = type(block).forward(block, given.x, *given.args, **given.kwargs)
    return calls, output
