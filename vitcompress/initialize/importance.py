"""Which tokens matter in a fit?  Those on which the predictions depend: towards the end, the class token far above all.

A fit that counts all tokens alike spends itself on patches that nothing reads any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.insertion import layers_called
from vitcompress.plans.make import layer_shapes

TokenWeights = Mapping[str, Mapping[str, Tensor]]
"""By block and by layer inside it: what each token counts, `[N]`, or `[H, W]` on a grid; 1 on average."""

FLOOR = 0.5
"""What a token counts at least: a class token alone is one sample per image, too few for wide layers."""

MOST_IMAGES = 64  # means over them differ little from those over more
CHUNK_IMAGES = 8  # at a time, with what the backward pass needs


def token_weights(
    teacher: nn.Module, family: Family, blocks: Sequence[str], images: Iterable[Tensor]
) -> dict[str, dict[str, Tensor]]:
    """What each token counts in fits of the layers of some blocks, in float64.

    That is E‖∂ log p(y) / ∂ output‖², y drawn from the predictions p, for the outputs of a layer at the token's place:
    the trace of their Fisher information, over its mean. Without classes, a random projection of the features is taken.

    Args:
        teacher: in eval mode; not changed.
        family: of the teacher.
        blocks: names of the blocks.
        images: batches `[B, C, H, W]`, on the teacher's device; the first few are enough.

    Source: ours; Fisher information as in Martens and Grosse 2015, arXiv:1503.05671, Sec. 2.
    """
    places = [(block, layer) for block in blocks for layer in layer_shapes(family, teacher.get_submodule(block))]
    outputs: dict[tuple[str, str], Tensor] = {}
    sums: dict[tuple[str, str], Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(layers_called(teacher))
        for block, layer in places:
            keep = partial(_keep, outputs, (block, layer))
            stack.callback(teacher.get_submodule(f"{block}.{layer}").register_forward_hook(keep).remove)
        chunks = (chunk for batch in images for chunk in batch.split(CHUNK_IMAGES))
        for chunk in islice(chunks, MOST_IMAGES // CHUNK_IMAGES):
            asked = _asked(teacher, teacher(chunk.detach().requires_grad_()), generator)
            grads = torch.autograd.grad(asked, [outputs[place] for place in places], materialize_grads=True)
            for place, grad in zip(places, grads, strict=True):
                sums[place] = sums.get(place, 0) + grad.double().square().mean(-1).sum(0)
    weights: dict[str, dict[str, Tensor]] = {block: {} for block in blocks}
    for (block, layer), found in sums.items():
        share = found / found.mean() if found.any() else torch.ones_like(found)
        weights[block][layer] = FLOOR + (1 - FLOOR) * share
    return weights


def _keep(outputs: dict[Any, Tensor], place: Any, module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Forward hook: note what a layer gives."""
    outputs[place] = output


def _asked(teacher: nn.Module, found: Tensor, generator: torch.Generator) -> Tensor:
    """What is differentiated, of logits or features `[B, K]`: a sum over images."""
    if not getattr(teacher, "num_classes", 0):
        return (found * torch.randn(found.shape, generator=generator).to(found)).sum()
    log_p = F.log_softmax(found.float(), dim=-1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
    return log_p.gather(1, drawn.to(found.device)).sum()
