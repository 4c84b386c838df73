"""Which images are starts and plans fitted to?  A few of the training images, by seed, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitcompress.data.loaders import check_readable, evaluation_loader
from vitcompress.data.sets import ImageSet
from vitcompress.data.streams import StreamReader
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe

BATCH_IMAGES = 32


def drawn(images: ImageSet, count: int, *, seed: int, after: int = 0) -> ImageSet:
    """Some of the images, in a random order; of a stream, the first in shuffled shards.

    Args:
        images: to draw from.
        count: most images to draw.
        seed: of the order.
        after: how many of the order to leave out, for they were drawn before.
    """
    if isinstance(images.reader, StreamReader):
        return images.streamed(images.reader.drawn(count, after=after, seed=seed))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return images.subset(order[after : after + count], images.name)


def calibration_batches(images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe) -> Iterator[Tensor]:
    """The images as the model takes them, `[B, C, H, W]`, B up to 32.

    Args:
        images: that `drawn` gave.
        config: timm's data config.
        recipe: workers, and what to do about unreadable images.

    Raises:
        DataError: an unreadable image, or none that is readable.
    """
    recipe = replace(recipe, batch_size=min(BATCH_IMAGES, recipe.batch_size))
    seen = 0
    for batch in evaluation_loader(images, config, recipe):
        check_readable(batch, skip=recipe.skip_bad_images)
        if len(batch.labels):
            seen += len(batch.labels)
            yield batch.images
    if seen == 0:
        raise DataError(f"{images.name}: not one calibration image could be read.")
