"""Record what modules receive and return while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitcompress.families.insertion import layers_called


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
            handle = model.get_submodule(name).register_forward_hook(
                lambda module, args, kwargs, output, name=name: record(name, Call(args, kwargs, output)),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield


def run_recorded(
    model: nn.Module, images: Iterable[Tensor], names: Iterable[str], record: Callable[[str, Call], None]
) -> None:
    """Run a model on batches of images, and pass every call of some linear layers to `record`.

    Args:
        model: in eval mode.
        images: batches `[B, C, H, W]`, on the model's device.
        names: full names of the layers.
        record: called with a layer's name and the call, after its forward pass.
    """
    with torch.no_grad(), layers_called(model), recording(model, names, record):
        for batch in images:
            model(batch)


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


def block_outputs(block: nn.Module, given: BlockInput, count: int) -> Tensor:
    """Run a block on all images, `count` at a time, and return its outputs `[B, ..., C]`."""
    return torch.cat([run_block(block, given._replace(x=chunk))[1] for chunk in given.x.split(count)])


class _Reached(Exception):  # noqa: N818 - not an error
    """All modules that a caller waits for have been called."""


def run_part(block: nn.Module, given: BlockInput, names: Sequence[str]) -> dict[str, Call]:
    """Run a block until some of its modules have been called, and return their calls by name.

    Args:
        block: any block.
        given: its arguments.
        names: modules inside the block; all are called.
    """
    calls: dict[str, Call] = {}

    def record(name: str, call: Call) -> None:
        calls[name] = call
        if len(calls) == len(names):
            raise _Reached

    with recording(block, names, record), suppress(_Reached):
        type(block).forward(block, given.x, *given.args, **given.kwargs)
    return calls


def run_visiting(
    model: nn.Module, names: Iterable[str], images: Tensor, visit: Callable[[str, BlockInput], Tensor]
) -> None:  # fmt: skip
    """Run a model without gradients, and let `visit` compute the outputs of some blocks.

    Args:
        model: in eval mode.
        names: full names of the blocks.
        images: `[B, C, H, W]`, on the model's device.
        visit: called with a block's name and arguments, in the order of running; returns its
            output.
    """

    def visiting(name: str) -> Callable[..., Tensor]:
        return lambda x, *args, **kwargs: visit(name, BlockInput(x, args, kwargs))

    with torch.no_grad(), ExitStack() as stack:
        for name in names:
            block: Any = model.get_submodule(name)
            block.forward = visiting(name)
            stack.callback(delattr, block, "forward")  # restores the method of the class
        model(images)


def block_inputs(model: nn.Module, name: str, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield what a block receives, `[B, ..., C]`, for each batch; the model runs no further.

    Args:
        model: in eval mode.
        name: full name of the block.
        batches: images `[B, C, H, W]`, on the model's device.
    """

    def record(name: str, given: BlockInput) -> Tensor:
        received.append(given.x)
        raise _Reached

    for batch in batches:
        received: list[Tensor] = []
        with suppress(_Reached):
            run_visiting(model, [name], batch, record)
        yield received[0]


def first_images(batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Yield the first `count` images of some batches, and ask for no batch beyond them."""
    for batch in batches:
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return
