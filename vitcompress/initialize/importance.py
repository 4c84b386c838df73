"""Weight tokens in a fit by how much the predictions depend on them.

In late blocks, that is the class token above all. A fit that counts all tokens alike is spent on
patches that no later layer reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.insertion import layers_called
from vitcompress.families.outputs import deviation_of, outputs_of, outputs_on
from vitcompress.initialize.inputs import first_images, recording
from vitcompress.initialize.regression import wide
from vitcompress.plans.make import layer_shapes

TokenWeights = Mapping[str, Mapping[str, Tensor]]
"""Weights of tokens by block and layer: `[N]`, or `[H, W]` on a grid; 1 on average."""

FLOOR = 0.5
"""Minimum weight of a token; the class token alone has too few samples for wide layers."""

MAX_IMAGES = 64  # more change the means little
CHUNK_IMAGES = 8  # in one forward and backward pass


def token_weights(
    teacher: nn.Module, family: Family, blocks: Sequence[str], images: Iterable[Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Compute how much each token counts in fits of the layers of some blocks, in float64.

    The weight is E‖∂ log p(y) / ∂ output‖² with y drawn from the predictions p, for the layer's
    output at the token: the trace of its Fisher information, divided by the mean. p is what the
    kind of the teacher's outputs makes it; of features, a random projection is differentiated
    instead.

    Args:
        teacher: in eval mode; not changed.
        family: of the teacher.
        blocks: names of the blocks.
        images: batches `[B, C, H, W]`, on the teacher's device; only the first 64 images are used.

    Source: ours; Fisher information as in Martens and Grosse 2015, arXiv:1503.05671, Sec. 2.
    """
    layers = {block: list(layer_shapes(family, teacher.get_submodule(block))) for block in blocks}
    names = [f"{block}.{layer}" for block in blocks for layer in layers[block]]
    outputs: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    chunks = torch.cat(list(first_images(images, MAX_IMAGES))).split(CHUNK_IMAGES)
    kind = outputs_of(teacher)
    deviation = deviation_of(outputs_on(teacher, chunks)) if kind.uses_deviation else torch.ones(1)
    with (
        torch.enable_grad(),
        layers_called(teacher),
        recording(teacher, names, lambda name, call: outputs.update({name: call.output})),
    ):
        for chunk in chunks:
            predictions = teacher(chunk.detach().requires_grad_()).float()
            objective = kind.score(predictions, deviation, generator)
            grads = torch.autograd.grad(objective, [outputs[name] for name in names], materialize_grads=True)
            for name, grad in zip(names, grads, strict=True):
                sums[name] = sums.get(name, 0) + wide(grad).square().mean(-1).sum(0)
    return {block: {layer: _weights(sums[f"{block}.{layer}"]) for layer in layers[block]} for block in blocks}


def _weights(squares: Tensor) -> Tensor:
    """Weights of tokens, from the sums of their squared gradients, both `[N]` or `[H, W]`."""
    share = squares / squares.mean() if squares.any() else torch.ones_like(squares)
    return FLOOR + (1 - FLOOR) * share
