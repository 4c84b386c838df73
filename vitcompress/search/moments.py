"""Compute second moments of what the layers of some blocks receive."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.narrow import is_plain_attention
from vitcompress.initialize.importance import TokenWeights
from vitcompress.initialize.inputs import Call, run_recorded
from vitcompress.plans.make import layer_shapes
from vitcompress.search.progress import BlockMoments, State

CHUNK_IMAGES = 32


def block_moments(
    state: State,
    model: nn.Module,
    family: Family,
    images: Tensor,
    weights: TokenWeights,
    tell: Callable[[int], None],
) -> None:
    """Compute the moments of what the layers of the state's blocks receive, in place.

    Of plain attention also those of queries and keys, `attn.q` and `attn.k`.

    Args:
        state: says which blocks, and how many images are done; gets the moments.
        model: in eval mode.
        family: of the model.
        images: `[N, C, H, W]`, on the model's device.
        weights: how much each token counts.
        tell: called with a number of images that are done.
    """
    places = {f"{block}.{layer}": (block, layer) for block in state.blocks for layer in layers_of(model, family, block)}

    def add(name: str, call: Call) -> None:
        block, layer = places[name]
        moments = state.moments[block]
        moments[layer].add(call.input, weight=weights[block][layer])
        if layer == "attn.qkv" and is_plain_attention(model.get_submodule(f"{block}.attn")):
            queries, keys, _ = call.output.chunk(3, dim=-1)
            moments["attn.q"].add(queries, weight=weights[block][layer])
            moments["attn.k"].add(keys, weight=weights[block][layer])

    for chunk in images[state.num_fitted :].split(CHUNK_IMAGES):
        if not len(chunk):  # all are done
            break
        with state.step():
            run_recorded(model, [chunk], places, add)
            state.num_fitted += len(chunk)
        tell(len(chunk))


def means_of(model: nn.Module, moments: BlockMoments) -> dict[str, Tensor]:
    """Mean inputs of the layers that have a bias, by full name."""
    return {
        f"{block}.{layer}": m.mean
        for block in moments for layer, m in moments[block].items()
        if getattr(_submodule(model, f"{block}.{layer}"), "bias", None) is not None
    }  # fmt: skip


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # queries and keys are no modules
        return None


def layers_of(model: nn.Module, family: Family, block: str) -> list[str]:
    """Names of a block's linear layers."""
    return list(layer_shapes(family, model.get_submodule(block)))
