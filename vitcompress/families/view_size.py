"""Let a model take images of another size for a while, with the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.layers import Format
from torch import nn

from vitcompress.errors import first_line
from vitcompress.families.registry import find_family


def view_size_fault(model: nn.Module, size: tuple[int, int]) -> str:
    """Return why a model does not take images of another size, or an empty string.

    Args:
        model: may be on the meta device; not changed.
        size: (height, width) of an image.
    """
    family = find_family(model)
    if family is not None and not family.any_view_size:
        return "its positions belong to one image size"
    empty = copy.deepcopy(model).to("meta").eval()
    channels = next(layer.in_channels for layer in empty.modules() if isinstance(layer, nn.Conv2d))
    try:
        with torch.no_grad(), taking_views(empty, size):
            empty(torch.empty(1, channels, *size, device="meta"))
    except Exception as error:  # timm asserts, torch raises; either way the model does not take the size
        return first_line(error)
    return ""


def half_size(model: nn.Module) -> tuple[int, int]:
    """Return half of each side of a model's images, to the nearest multiple of its patch size.

    Args:
        model: has a patch embedding.
    """
    embed: Any = model.patch_embed
    patch = embed.feat_ratio(as_scalar=False)
    height, width = (max(1, round(count / 2)) * side for count, side in zip(embed.grid_size, patch, strict=True))
    return height, width


@contextmanager
def taking_views(model: nn.Module, size: tuple[int, int]) -> Iterator[None]:
    """Let a model take images of another size, in place, until the context ends.

    Position embeddings are resampled in each forward pass, so that gradients reach those of the
    full size; rotary embeddings are computed for the smaller grid.

    Args:
        model: of a family with `any_view_size`, or of none.
        size: (height, width) of an image, multiples of the patch size.
    """
    if find_family(model) is None:
        yield
        return
    timm_model: Any = model
    embed = timm_model.patch_embed
    grid, full_grid = tuple(embed.dynamic_feat_size(size)), tuple(embed.grid_size)
    with ExitStack() as stack:
        for owner, name, value in (
            (timm_model, "dynamic_img_size", True),
            (embed, "strict_img_size", False),
            (embed, "flatten", False),
            (embed, "output_fmt", Format.NHWC),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        rope = getattr(timm_model, "rope", None)
        if rope is not None:
            stack.callback(rope.update_feat_shape, full_grid)
            rope.update_feat_shape(grid)
        yield
