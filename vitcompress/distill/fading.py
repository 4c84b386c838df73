"""How does a model lose matrices without losing its function at once?  They fade out while it trains.

    block i computes with   W + β · (W_i − W₀)        β: 1 ──────╲______ 0 at `--fade` of the training

W is its group's shared matrix, or what factors make of it, W₀ where that started, and W_i the block's own matrix in the
source. At β = 1 every block does what it did in the source; at β = 0 the sharing is complete, and nothing of this is
left in the student. Narrow layers cannot fade: their neurons and channels are others.
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
    """β, falling linearly from 1 to 0.

    Args:
        done: share of the training that is over, 0–1.
        share: share of the training that the fading takes, 0–1; 0 where there is none.
    """
    return max(0.0, 1 - done / share) if share else 0.0


@contextmanager
def fading(student: nn.Module, source: nn.Module, plan: Plan, share: float) -> Iterator[Callable[[float], None]]:
    """Let each block compute with a fading part of its own matrices and biases, until the context ends.

    Costs one addition of matrices per layer and step, and the memory of the source's matrices.

    Args:
        student: its groups are tied and started.
        source: the model it was made from, on the same device.
        plan: the student's.
        share: share of the training that the fading takes; 0 changes nothing.

    Yields:
        To be called before each step with the share of the training that is over.

    Source: ours, a continuation method; MiniViT trains from random weights and has nothing to lose.
    """
    beta = [1.0 if share else 0.0]

    def step(done: float) -> None:
        beta[0] = fade_factor(done, share)

    faded: list[nn.Linear] = []
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
                        faded.append(layer)
        try:
            yield step
        finally:
            for layer in faded:
                del layer.forward  # the instance's; the class's is back


def _fade(layer: nn.Linear, own: nn.Linear, beta: list[float]) -> None:
    """Make `layer` compute with β times what `own` has more, in place."""
    weight = own.weight.detach().to(layer.weight.device) - layer.weight.detach()
    bias = None if layer.bias is None else own.bias.detach().to(layer.bias.device) - layer.bias.detach()

    def forward(x: Tensor) -> Tensor:
        if not beta[0]:
            return type(layer).forward(layer, x)  # factors one after the other
        return F.linear(
            x,
            layer.weight.add(weight, alpha=beta[0]),
            None if layer.bias is None or bias is None else layer.bias.add(bias, alpha=beta[0]),
        )

    layer.forward = forward  # type: ignore[method-assign, assignment]
