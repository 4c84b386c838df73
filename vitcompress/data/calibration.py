"""Calibration images: a few training images, without augmentation, for starts and the search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitcompress.data.loaders import count_unreadable, evaluation_loader
from vitcompress.data.sets import ImageSet
from vitcompress.data.streams import StreamReader
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe

BATCH_IMAGES = 32


def draw_images(images: ImageSet, count: int, *, seed: int, after: int = 0) -> ImageSet:
    """Draw some of the images in random order; of a stream, the first ones in shuffled shards.

    Args:
        images: images to draw from.
        count: maximum number of images to draw.
        seed: decides the order.
        after: number of images to skip in this order, because they were drawn before.
    """
    if isinstance(images.reader, StreamReader):
        return replace(images, reader=images.reader.draw(count, after=after, seed=seed))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return images.subset(order[after : after + count], images.name)


def calibration_batches(images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe) -> Iterator[Tensor]:
    """Yield the images as batches `[B, C, H, W]` of model inputs, B at most 32.

    Args:
        images: images from `draw_images`.
        config: timm's data config.
        recipe: batch size, workers, and whether to skip unreadable images.

    Raises:
        DataError: an image is unreadable, or all are.
    """
    recipe = replace(recipe, batch_size=min(BATCH_IMAGES, recipe.batch_size))
    num_images = 0
    for batch in evaluation_loader(images, config, recipe):
        count_unreadable(batch, skip=recipe.skip_bad_images)
        if len(batch.labels):
            num_images += len(batch.labels)
            yield batch.images
    if num_images == 0:
        raise DataError(f"{images.name}: no calibration image could be read.")
