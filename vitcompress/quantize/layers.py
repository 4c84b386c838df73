"""How does a layer compute with a quantised weight?  Its class gets a `weight` that is made anew at each use.

Whatever reads `layer.weight`, `F.linear` in timm's attention too, gets the numbers that are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.quantize.codecs import STORES, Codec, Shape, matrix_names


class StoredMatrix(nn.Module):
    """A matrix kept as codes and scales; called, it gives the numbers.

    A module, which layers that share a matrix share, and not two buffers of each: moving a model to another device
    copies a buffer once per owner.

    Args:
        codes: as the codec has them.
        scale: the same.
        shape: of the matrix.
        codec: decodes them.
    """

    codes: Tensor
    scale: Tensor
    like: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, shape: Shape, codec: Codec) -> None:
        super().__init__()
        self.shape, self.codec = shape, codec
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("like", torch.empty(0), persistent=False)  # follows model.half() and its kind

    def forward(self) -> Tensor:
        """The matrix, in the type that the model computes in."""
        return self.codec.decode(self.codes, self.scale, self.shape).to(self.like.dtype)


def keep_quantized(owner: nn.Module, leaf: str, matrix: StoredMatrix) -> None:
    """Let `owner` compute with a stored matrix in the place of its parameter `leaf`, in place."""
    del owner._parameters[leaf]
    setattr(owner, f"stored_{leaf}", matrix)
    _make_at_use(owner, leaf, _decode)


def _decode(owner: nn.Module, leaf: str) -> Tensor:
    found: Tensor = owner._modules[f"stored_{leaf}"]()  # type: ignore[misc]
    return found


def _make_at_use(owner: nn.Module, leaf: str, make: Callable[[Any, str], Tensor]) -> None:
    """Let `owner.<leaf>` be what `make(owner, leaf)` gives, in place; its parameters are left as they are.

    A class of its own, as `torch.nn.utils.parametrize` makes one, but no parameter moves: optimizers and running means,
    which go by their order, notice nothing.
    """
    kind = type(owner)
    made = property(lambda self: make(self, leaf))
    owner.__class__ = type(kind.__name__, (kind,), {leaf: made, "__module__": kind.__module__})


class _StraightThrough(torch.autograd.Function):
    """The rounded numbers forwards, the gradient unchanged backwards.

    Source: Bengio et al. 2013, arXiv:1308.3432.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@contextmanager
def quantising(student: nn.Module, store: str, fraction: float) -> Iterator[Callable[[float], None]]:
    """Let the last part of the training compute with matrices as they will be stored, until the context ends.

    Each matrix is quantised once a step, however many blocks share it. The optimizer goes on moving the floating one.

    Args:
        student: shares its parameters.
        store: a key of `STORES`.
        fraction: share of the training that computes so; 0 changes nothing.

    Yields:
        To be called before each step with the share of the training that is over.

    Source: Jacob et al. 2018, arXiv:1712.05877, quantisation-aware training; of weights only.
    """
    codec = STORES[store].codec
    rounded: dict[int, Tensor] = {}
    on = [False]

    def step(done: float) -> None:
        rounded.clear()
        on[0] = fraction > 0 and done >= 1 - fraction

    def make(owner: nn.Module, leaf: str) -> Tensor:
        weight = owner._parameters[leaf]
        assert codec is not None
        assert weight is not None
        if not on[0]:
            return weight
        if id(weight) not in rounded:
            with torch.no_grad():
                rounded[id(weight)] = codec.round_trip(weight)
        found: Tensor = _StraightThrough.apply(weight, rounded[id(weight)])
        return found

    before: list[tuple[nn.Module, type[nn.Module]]] = []
    for name in sorted(matrix_names(student)) if codec and fraction else ():
        path, _, leaf = name.rpartition(".")
        owner = student.get_submodule(path)
        before.append((owner, type(owner)))
        _make_at_use(owner, leaf, make)
    try:
        yield step
    finally:
        for owner, kind in reversed(before):
            owner.__class__ = kind
