"""Measure what options cost, all at once, by the second order of the KL divergence.

A change of the outputs by δ costs about ½ δᵀ F δ nats, where F is the Fisher information of what
the outputs mean. With random directions ξ whose covariance is F, that is ½ E(ξ·δ)². To first order,
ξ·δ is the inner product of a layer's change with the gradient of ξ·outputs for the layer's weights:

    score = Σ over layers ⟨W' − W, Σ over tokens (∂ ξ·outputs / ∂ layer's output) inputᵀ⟩

One backward pass gives the gradients of one image; each option then costs one inner product. In
bf16, where the device is faster in it, this takes half the time; costs change by 1 %, far less than
the choice of images changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitcompress.families.insertion import layers_called
from vitcompress.families.outputs import deviation_of, outputs_of, outputs_on
from vitcompress.initialize.inputs import Call, recording
from vitcompress.runtime.precision import is_faster_in_bf16
from vitcompress.search.changes import QK, BlockChanges
from vitcompress.search.progress import State

MAX_CHUNK_IMAGES = 32
CHUNK_CHANNELS = 32 * 192
"""Images at a time times channels of the stream: what is kept for the backward pass is bounded."""
CACHED = 2**14
"""Columns of weights that are converted at a time on a CPU, so that they stay in its cache."""
DIRECTIONS = 2
"""Random directions per image; with one, plans of DeiT-Tiny start up to a tenth worse."""


def add_scores(
    state: State,
    model: nn.Module,
    changes: Mapping[str, BlockChanges],
    means: Mapping[str, Tensor],
    images: Tensor,
    tell: Callable[[int], None],
) -> None:
    """Add the scores of options to the state's, in place.

    Args:
        state: says how many images are done; the scores of its context are
            `[N · DIRECTIONS, options]`. Of an option of several blocks, the blocks' scores add up.
        model: in eval mode; not changed.
        changes: by block.
        means: mean inputs `[in]` of the layers with a bias, by full name; the bias takes up the
            mean of a change.
        images: that nothing was fitted to, `[N, C, H, W]`, on the model's device.
        tell: called with a number of images that are done.

    Source: ours; the Fisher information as in Martens and Grosse 2015, arXiv:1503.05671, Sec. 2;
        the inner products as in Singh and Alistarh 2020, arXiv:2004.14340, Sec. 3.
    """
    kind, generator = outputs_of(model), torch.Generator().manual_seed(0)
    size = max(1, min(MAX_CHUNK_IMAGES, CHUNK_CHANNELS // int(model.num_features)))  # type: ignore[arg-type]
    deviation = deviation_of(outputs_on(model, images.split(size))) if kind.uses_deviation else torch.ones(1)
    if state.generator is not None:
        generator.set_state(state.generator)
    names = [f"{block}.{_module(layer)}" for block, layers in changes.items() for layer in layers]
    names = list(dict.fromkeys(names))
    scores, calls, memory = state.scores[state.context], dict[str, Call](), dict[int, Tensor]()
    device, in_bf16 = images.device.type, is_faster_in_bf16(images.device.type)
    # on a CPU, fused attention has a fast backward pass in fp32, and a slow one in bf16
    attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" and in_bf16 else nullcontext()
    with (
        torch.autocast(device, torch.bfloat16, enabled=in_bf16), attention,
        torch.enable_grad(), layers_called(model), recording(model, names, calls.__setitem__),
    ):  # fmt: skip
        for chunk in images[state.num_judged :].split(size) if state.num_judged < len(images) else ():
            predictions = model(chunk.detach().requires_grad_()).float()
            outputs = [calls[name].output for name in names]
            grads: dict[str, list[Tensor]] = {name: [] for name in names}
            for number in range(DIRECTIONS):
                score = kind.score(predictions, deviation, generator)
                more = number + 1 < DIRECTIONS
                for name, grad in zip(names, torch.autograd.grad(score, outputs, retain_graph=more), strict=True):
                    grads[name].append(grad.reshape(len(chunk), -1, grad.shape[-1]))  # windows are image by image
            with state.step():
                row = DIRECTIONS * state.num_judged
                for block, layers in changes.items():
                    for layer, change in layers.items():
                        name = f"{block}.{_module(layer)}"
                        gradients = _gradients(
                            layer, model.get_submodule(block), calls[name], grads[name], means.get(name), memory
                        )
                        found = _inner_products(gradients, change.weights.flatten(1))
                        scores[row : row + len(found), change.numbers] += found.to(scores)
                state.num_judged, state.generator = state.num_judged + len(chunk), generator.get_state()
            calls.clear()
            tell(len(chunk))


def nats_of(scores: Tensor) -> float:
    """Return the KL divergence that scores `[N]` mean, nats per image."""
    return float(scores.double().square().mean() / 2)


def _module(layer: str) -> str:
    """The module whose input and output a layer's scores are computed from."""
    return "attn.qkv" if layer == QK else layer


def _gradients(
    layer: str, block: Any, call: Call, grads: Sequence[Tensor], mean: Tensor | None, memory: dict[int, Tensor]
) -> Tensor:  # fmt: skip
    """Gradients for a layer's weights, a row for each direction and image, `[R, out · in]`.

    Args:
        layer: as in `BlockChanges`.
        block: contains it.
        call: of its module.
        grads: for its output, one for each direction, `[B, N, out]`.
        mean: what is subtracted from the inputs, `[in]`; None subtracts nothing.
        memory: gradients of earlier calls, by their number; they are overwritten.
    """
    with torch.no_grad():
        if layer == QK:
            heads = block.attn.num_heads
            q, *grads = (x.chunk(3, dim=-1)[0].unflatten(-1, (heads, -1)) for x in (call.output, *grads))
            return torch.cat([torch.einsum("bnhd,bnhe->bhde", q, grad).flatten(1) for grad in grads])
        x = call.input.reshape(*grads[0].shape[:2], -1).to(grads[0].dtype)
        x = x if mean is None else x - mean.to(x)
        size = len(grads) * len(x) * grads[0].shape[-1] * x.shape[-1]
        if size not in memory:
            memory[size] = x.new_empty(size)
        found = memory[size].view(len(grads), len(x), grads[0].shape[-1], x.shape[-1])
        for grad, part in zip(grads, found, strict=True):
            torch.bmm(grad.mT, x, out=part)
        return found.flatten(0, 1).flatten(1)


def _inner_products(gradients: Tensor, weights: Tensor) -> Tensor:
    """Multiply gradients `[R, M]` by changes of weights `[K, M]`: `[R, K]`."""
    if gradients.dtype == weights.dtype or gradients.device.type != "cpu":
        return gradients @ weights.to(gradients).T
    total = gradients.new_zeros(len(gradients), len(weights))
    for part, change in zip(gradients.split(CACHED, 1), weights.split(CACHED, 1), strict=True):
        total.addmm_(part, change.to(part).T)
    return total
