"""Fade out the blocks' own matrices during training, so that sharing sets in gradually.

    block i computes with   W + β · (W_i − W₀)        β: 1 ─────╲_____ 0 at `--fade` of the training

W is the shared matrix of the group, or the product of factors, W₀ its value at the start, and W_i
the matrix of block i in the source. At β = 1 every block computes what it did in the source; at
β = 0 the sharing is complete, and the student holds nothing else. Narrow layers cannot fade: their
neurons and channels differ from the source's. Neither can parts that are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.families.insertion import layers_called
from vitcompress.families.narrow import narrowed_shapes
from vitcompress.plans.model import Plan


def fade_factor(done: float, share: float) -> float:
    """Return β, which falls linearly from 1 to 0.

    Args:
        done: share of the training that is over, 0–1.
        share: share of the training that fading takes, 0–1; 0 for no fading.
    """
    return max(0.0, 1 - done / share) if share else 0.0


@contextmanager
def fading(student: nn.Module, source: nn.Module, plan: Plan, share: float) -> Iterator[Callable[[float], None]]:
    """Add fading parts of the blocks' own matrices and biases, until the context ends.

    Costs one addition of matrices per layer and step, and the memory of the source's matrices.

    Args:
        student: its groups are tied, and it has its start weights.
        source: the model that is compressed, on the same device.
        plan: plan of the student.
        share: share of the training that fading takes; 0 changes nothing.

    Yields:
        A function to call before each step with the share of the training that is over.

    Source: ours, a continuation method; MiniViT trains from random weights and needs no fading.
    """
    beta = [1.0 if share else 0.0]

    def step(done: float) -> None:
        beta[0] = fade_factor(done, share)

    with ExitStack() as stack:
        if share:
            stack.enter_context(layers_called(student))
            for group in plan.groups:
                layers = {name.rpartition(".")[0] for name in group.shared} | set(group.ranks)
                layers -= set(narrowed_shapes(source.get_submodule(group.donor), group.widths))
                for path in (f"{block}.{layer}" for block in group.blocks for layer in sorted(layers)):
                    layer = student.get_submodule(path)
                    if isinstance(layer, nn.Linear):
                        _fade(layer, source.get_submodule(path), beta)  # type: ignore[arg-type]
                        stack.callback(delattr, layer, "forward")  # restores the method of the class
        yield step


def _fade(layer: nn.Linear, source: nn.Linear, beta: list[float]) -> None:
    """Make `layer` add β times its difference from `source` to its weights, in place."""
    weight = source.weight.detach().to(layer.weight.device) - layer.weight.detach()
    bias = None if layer.bias is None else source.bias.detach().to(layer.bias.device) - layer.bias.detach()

    def forward(x: Tensor) -> Tensor:
        if not beta[0]:
            return type(layer).forward(layer, x)  # applies factors one after the other
        return F.linear(
            x,
            layer.weight.add(weight, alpha=beta[0]),
            None if layer.bias is None or bias is None else layer.bias.add(bias, alpha=beta[0]),
        )

    layer.forward = forward  # type: ignore[method-assign, assignment]
