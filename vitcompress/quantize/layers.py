"""Layers that compute with quantized weights: `layer.weight` becomes a property that decodes.

Everything that reads `layer.weight`, including `F.linear` in timm's attention, gets the stored
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.quantize.codecs import STORES, Codec, Shape, matrix_names


class StoredMatrix(nn.Module):
    """A matrix kept as codes and scales; calling it decodes the matrix.

    Layers that share a matrix share this module. With two buffers per layer instead, moving the
    model to another device would copy them once per layer.

    Args:
        codes: codes from `codec`.
        scale: scales from `codec`.
        shape: shape of the matrix.
        codec: decodes the matrix.
    """

    codes: Tensor
    scale: Tensor
    like: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, shape: Shape, codec: Codec) -> None:
        super().__init__()
        self.shape, self.codec = shape, codec
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("like", torch.empty(0), persistent=False)  # follows model.half() and the like

    def forward(self) -> Tensor:
        """Decode the matrix, in the dtype that the model computes in."""
        return self.codec.decode(self.codes, self.scale, self.shape).to(self.like.dtype)


def keep_quantized(owner: nn.Module, leaf: str, matrix: StoredMatrix) -> None:
    """Replace the parameter `leaf` of `owner` by a stored matrix, in place."""
    del owner._parameters[leaf]
    setattr(owner, f"stored_{leaf}", matrix)
    _set_property(owner, leaf, lambda owner, leaf: getattr(owner, f"stored_{leaf}")())


def _set_property(owner: nn.Module, leaf: str, compute: Callable[[Any, str], Tensor]) -> None:
    """Make `owner.<leaf>` a property that calls `compute(owner, leaf)`, in place.

    Gives `owner` a new class, like `torch.nn.utils.parametrize`, but leaves its parameters in
    place: optimizers and moving averages depend on their order.
    """
    kind = type(owner)
    value = property(lambda self: compute(self, leaf))
    owner.__class__ = type(kind.__name__, (kind,), {leaf: value, "__module__": kind.__module__})


class _StraightThrough(torch.autograd.Function):
    """Returns the rounded weight in the forward pass, and passes the gradient through unchanged.

    Source: Bengio et al. 2013, arXiv:1308.3432.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@contextmanager
def quantization_aware_training(student: nn.Module, store: str, fraction: float) -> Iterator[Callable[[float], None]]:
    """Make the last part of the training compute with rounded matrices, within a `with` block.

    Each matrix is rounded once per step, however many blocks share it. The optimizer keeps updating
    the floating-point matrix.

    Args:
        student: the student, whose blocks share parameters.
        store: a key of `STORES`.
        fraction: final fraction of the training to round in, 0-1; 0 changes nothing.

    Yields:
        A function to call before each step with the fraction of the training that is over.

    Source: quantization-aware training, Jacob et al. 2018, arXiv:1712.05877; of weights only.
    """
    codec = STORES[store].codec
    rounded: dict[int, Tensor] = {}
    active = [False]

    def step(done: float) -> None:
        rounded.clear()
        active[0] = fraction > 0 and done >= 1 - fraction

    def compute(owner: nn.Module, leaf: str) -> Tensor:
        weight = owner._parameters[leaf]
        assert codec is not None
        assert weight is not None
        if not active[0]:
            return weight
        if id(weight) not in rounded:
            with torch.no_grad():
                rounded[id(weight)] = codec.round_trip(weight)
        weight_rounded: Tensor = _StraightThrough.apply(weight, rounded[id(weight)])
        return weight_rounded

    owners: list[tuple[nn.Module, type[nn.Module]]] = []
    for name in sorted(matrix_names(student)) if codec and fraction else ():
        path, _, leaf = name.rpartition(".")
        owner = student.get_submodule(path)
        owners.append((owner, type(owner)))
        _set_property(owner, leaf, compute)
    try:
        yield step
    finally:
        for owner, kind in reversed(owners):
            owner.__class__ = kind
