"""Calibration images: training images, not augmented, that starts are fitted to and judged on.

Starts are fitted to some of them; what nothing was fitted to says how good a start is. Both parts
are spread over the classes, as evenly as the images allow.

    random order   →   round robin over classes   →   fitted | judged
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitcompress.data.loaders import Batch, count_unreadable, evaluation_loader
from vitcompress.data.sets import ImageSet
from vitcompress.data.streams import StreamReader
from vitcompress.errors import DataError
from vitcompress.recipe import MAX_CALIBRATION_IMAGES, DataRecipe

BATCH_IMAGES = 32
MAX_JUDGED_IMAGES = 128
POOL = 2  # images whose classes are predicted, per image that is drawn
Classify = Callable[[ImageSet], Mapping[int, int]]


@dataclass(frozen=True)
class Drawing:
    """Which images of a set are for calibration.

    Attributes:
        seed: decides the order of the images.
        fitted: positions in the set of the images that starts are fitted to; of a stream, in its
            shuffled shards.
        judged: positions of the images that costs are measured on: others, but for a single image.
        num_classes: number of classes of the fitted images; 0 where they are not known.
    """

    seed: int
    fitted: tuple[int, ...]
    judged: tuple[int, ...]
    num_classes: int = 0

    def chosen(self, images: ImageSet, positions: Sequence[int]) -> ImageSet:
        """Return the images at the drawing's `fitted` or `judged` positions of the set."""
        if images.streams:
            return draw_images(images, len(positions), seed=self.seed, after=positions[0])
        return images.subset(positions, images.name)

    def others(self, images: ImageSet, count: int) -> ImageSet:
        """Return up to `count` images of the set that are not drawn; any ones if there are none."""
        if images.streams:
            return draw_images(images, count, seed=self.seed, after=len({*self.fitted, *self.judged}))
        return images.subset((self._rest(images) or _random_order(images, self.seed))[:count], images.name)

    def unjudged(self, images: ImageSet, count: int) -> ImageSet:
        """Return up to `count` images of the set that nothing is judged on, the fitted ones first.

        Of a stream, they are others than the fitted ones, too.
        """
        if images.streams:
            return self.others(images, count)
        fitted = [position for position in self.fitted if position not in self.judged] or [*self.fitted]
        return images.subset([*fitted, *self._rest(images)][:count], images.name)

    def _rest(self, images: ImageSet) -> list[int]:
        """Return the positions that are not drawn, in random order."""
        drawn = {*self.fitted, *self.judged}
        return [position for position in _random_order(images, self.seed) if position not in drawn]


def draw_calibration(
    images: ImageSet, count: int | None, *, seed: int, classify: Classify | None = None
) -> Drawing:  # fmt: skip
    """Draw the calibration images, spread over their classes.

    Of a stream, they are the first images in shuffled shards, whatever their classes.

    Args:
        images: training images; their labels, if any, are classes of the model.
        count: number of images to fit to; None for as many as there are, at most 1,024.
        seed: decides the drawing.
        classify: `(images) -> class of each readable image, by its number in the reader`; called
            for a pool of twice as many unlabeled images. None where the model has no classes.
    """
    count = count or MAX_CALIBRATION_IMAGES
    wanted = count + MAX_JUDGED_IMAGES
    if isinstance(images.reader, StreamReader):
        found = sum(1 for _ in images.reader.draw(wanted, after=0, seed=seed).one_pass())
        return _split(list(range(max(1, found))), count, seed)
    order, classes = _random_order(images, seed), None
    if images.labels is not None:
        classes = [images.label(images.indices[position]) for position in order]
    elif classify is not None:
        order = order[: POOL * wanted]
        class_of = classify(images.subset(order, images.name))
        order = [position for position in order if images.indices[position] in class_of]
        classes = [class_of[images.indices[position]] for position in order]
    if classes is None:
        return _split(order, count, seed)
    turns = round_robin(classes)
    drawing = _split([order[turn] for turn in turns], count, seed)
    return replace(drawing, num_classes=len({classes[turn] for turn in turns[: len(drawing.fitted)]}))


def round_robin(classes: Sequence[int]) -> list[int]:
    """Return positions of images such that the classes take turns; in each round, rare ones first.

    Args:
        classes: class of each image, in random order.
    """
    sizes, taken = Counter(classes), Counter[int]()
    rounds = []
    for number in classes:
        rounds.append(taken[number])
        taken[number] += 1
    return sorted(range(len(classes)), key=lambda position: (rounds[position], sizes[classes[position]]))


def _split(order: Sequence[int], count: int, seed: int) -> Drawing:
    """Split images into those to fit to and those to judge on.

    Where there are too few for both, a quarter is judged on, and one image is used for both.
    """
    total = len(order)
    num_judged = min(MAX_JUDGED_IMAGES, max(total - count, total // 4, 1))
    num_fitted = min(count, max(1, total - num_judged))
    judged = order[num_fitted : num_fitted + num_judged] or order
    return Drawing(seed, tuple(order[:num_fitted]), tuple(judged))


def _random_order(images: ImageSet, seed: int) -> list[int]:
    order: list[int] = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return order


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
    return images.subset(_random_order(images, seed)[after : after + count], images.name)


def predicted_classes(
    images: ImageSet, predict: Callable[[Tensor], Tensor], config: Mapping[str, Any], recipe: DataRecipe,
    tell: Callable[[float], None] = lambda done: None,
) -> dict[int, int]:  # fmt: skip
    """Return the predicted class of each readable image, by its number in the reader.

    Args:
        images: images that can be counted.
        predict: `(images [B, C, H, W]) -> logits [B, K]`.
        config: timm's data config.
        recipe: batch size, workers, and whether to skip unreadable images.
        tell: receives the share that is done, 0–1.

    Raises:
        DataError: an image is unreadable, or all are.
    """
    classes: dict[int, int] = {}
    numbered = replace(images, labels=range(len(images.reader)), numbering=None)  # unreadable images are left out
    for batch in _batches(numbered, config, recipe):
        found = predict(batch.images).argmax(1).tolist()
        classes.update(zip(batch.labels.tolist(), found, strict=True))
        tell(len(classes) / len(images))
    return classes


def calibration_batches(images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe) -> Iterator[Tensor]:
    """Yield the images as batches `[B, C, H, W]` of model inputs, B at most 32.

    Args:
        images: images from a drawing, or from `draw_images`.
        config: timm's data config.
        recipe: batch size, workers, and whether to skip unreadable images.

    Raises:
        DataError: an image is unreadable, or all are.
    """
    return (batch.images for batch in _batches(images, config, recipe))


def _batches(images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe) -> Iterator[Batch]:
    """Yield batches with at least one readable image."""
    recipe = replace(recipe, batch_size=min(BATCH_IMAGES, recipe.step_images))
    num_images = 0
    for batch in evaluation_loader(images, config, recipe):
        count_unreadable(batch, skip=recipe.skip_bad_images)
        if len(batch.labels):
            num_images += len(batch.labels)
            yield batch
    if num_images == 0:
        raise DataError(f"{images.name}: no calibration image could be read.")
