"""Which images starts are fitted to, and which ones they are judged on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import draw_image
from tests.data.opened import RGB, opened
from vitcompress.data.calibration import (
    MAX_JUDGED_IMAGES,
    Drawing,
    calibration_batches,
    draw_calibration,
    predicted_classes,
    round_robin,
)
from vitcompress.data.sets import ImageSet
from vitcompress.errors import DataError
from vitcompress.recipe import MAX_CALIBRATION_IMAGES, DataRecipe

ALONE = DataRecipe(num_workers=0)


class Paths:
    """Names of images that nobody opens."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        raise AssertionError("no image is needed to draw some")

    def where(self, index: int) -> str:
        return f"image {index}"


def image_set(count: int, labels: Sequence[int] | None = None) -> ImageSet:
    return ImageSet("images", Paths(count), labels, tuple(range(count)))


def classes_at(labels: Sequence[int], positions: Sequence[int]) -> Counter[int]:
    return Counter(labels[position] for position in positions)


def test_classes_take_turns_and_rare_ones_come_first() -> None:
    classes = [7, 7, 7, 7, 2, 7, 5, 5]
    turns = round_robin(classes)
    assert [classes[turn] for turn in turns] == [2, 5, 7, 5, 7, 7, 7, 7]
    assert turns == [4, 6, 0, 7, 1, 2, 3, 5]  # within a class the order stays


def test_every_class_is_fitted_to_as_evenly_as_there_are_images() -> None:
    labels = [0] * 900 + [1] * 50 + [2] * 49 + [3]
    drawing = draw_calibration(image_set(1000, labels), 40, seed=0)
    assert classes_at(labels, drawing.fitted) == {0: 13, 1: 13, 2: 13, 3: 1}
    assert classes_at(labels, drawing.judged) == {0: 128 - 37 - 36, 1: 37, 2: 36}  # all that is left of the rare ones
    assert drawing.num_classes == 4


def test_the_seed_decides_the_images() -> None:
    images = image_set(500, [number % 10 for number in range(500)])
    first, again, other = (draw_calibration(images, 20, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert set(first.fitted) != set(other.fitted)


@pytest.mark.parametrize(
    ("total", "count", "fitted", "judged"),
    [
        (5000, None, MAX_CALIBRATION_IMAGES, MAX_JUDGED_IMAGES),
        (5000, 2000, 2000, MAX_JUDGED_IMAGES),
        (5000, 8, 8, MAX_JUDGED_IMAGES),
        (1100, None, 1100 - MAX_JUDGED_IMAGES, MAX_JUDGED_IMAGES),
        (200, None, 150, 50),
        (12, 8, 8, 4),
        (12, 12, 9, 3),
        (3, None, 2, 1),
        (2, 8, 1, 1),
    ],
)
def test_others_are_judged_on(total: int, count: int | None, fitted: int, judged: int) -> None:
    drawing = draw_calibration(image_set(total), count, seed=0)
    assert (len(set(drawing.fitted)), len(set(drawing.judged))) == (fitted, judged)
    assert not {*drawing.fitted} & {*drawing.judged}
    assert drawing.num_classes == 0


def test_a_single_image_is_both_fitted_to_and_judged_on() -> None:
    assert draw_calibration(image_set(1), None, seed=0) == Drawing(0, (0,), (0,))


def test_without_labels_the_classes_of_twice_as_many_are_predicted() -> None:
    asked: list[tuple[int, ...]] = []

    def classify(images: ImageSet) -> Mapping[int, int]:
        asked.append(images.indices)
        return {index: int(index >= 900) for index in images.indices if index % 10}  # every tenth is unreadable

    drawing = draw_calibration(image_set(1000), 60, seed=0, classify=classify)
    (pool,) = asked
    assert len(set(pool)) == 2 * (60 + MAX_JUDGED_IMAGES)
    assert {*drawing.fitted, *drawing.judged} <= {index for index in pool if index % 10}
    rare = [index for index in pool if index >= 900 and index % 10]
    assert 10 < len(rare) < 60
    fitted = Counter(position >= 900 for position in drawing.fitted)
    assert fitted[True] == min(30, len(rare))
    assert drawing.num_classes == 2


def test_labels_are_not_predicted() -> None:
    def classify(images: ImageSet) -> Mapping[int, int]:
        raise AssertionError("there are labels")

    draw_calibration(image_set(30, [number % 3 for number in range(30)]), None, seed=0, classify=classify)


def test_the_rest_is_neither_fitted_to_nor_judged_on() -> None:
    images = image_set(300, [number % 3 for number in range(300)])
    drawing = draw_calibration(images, 100, seed=0)
    drawn = {*drawing.fitted, *drawing.judged}
    assert {*drawing.others(images, 1000).indices} == {*range(300)} - drawn
    assert len(drawing.others(images, 10)) == 10
    unjudged = [*drawing.unjudged(images, 1000).indices]
    assert unjudged[: len(drawing.fitted)] == [*drawing.fitted]
    assert sorted(unjudged) == sorted({*range(300)} - {*drawing.judged})
    assert len(drawing.unjudged(images, 10)) == 10
    everything = Drawing(0, tuple(range(200)), tuple(range(200, 300)))
    assert len(everything.others(images, 1000)) == 300


def test_positions_are_those_of_the_set_not_of_its_reader() -> None:
    images = image_set(100, [0] * 50 + [1] * 50).subset(range(40, 60), "some")
    drawing = draw_calibration(images, 10, seed=0)
    chosen = drawing.chosen(images, drawing.fitted)
    assert Counter(index >= 50 for index in chosen.indices) == {True: 5, False: 5}


def test_classes_are_predicted_of_what_can_be_read(tmp_path: Path) -> None:
    for number in range(6):
        Image.fromarray(np.full((40, 40, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    images, _ = opened(str(tmp_path), val_data=str(tmp_path))
    told: list[float] = []

    def predict(views: Tensor) -> Tensor:
        bright = (views.mean((1, 2, 3)) > -0.2).long()
        return torch.nn.functional.one_hot(bright, 5).float()

    config: dict[str, Any] = RGB
    skips = replace(ALONE, skip_bad_images=True, batch_size=2)
    assert predicted_classes(images, predict, config, skips, told.append) == {0: 0, 1: 0, 2: 0, 4: 1, 5: 1}
    assert told == sorted(told)
    assert len(told) == 3
    with pytest.raises(DataError, match="Unreadable image"):
        predicted_classes(images, predict, config, ALONE)


def test_the_images_are_those_of_the_drawing(tmp_path: Path) -> None:
    for number in range(8):
        draw_image(tmp_path / f"{number}.png", number)
    images, _ = opened(str(tmp_path), val_data=str(tmp_path))
    drawing = draw_calibration(images, None, seed=3)
    parts = [drawing.chosen(images, part) for part in (drawing.fitted, drawing.judged)]
    views = [torch.cat(list(calibration_batches(part, RGB, ALONE))) for part in parts]
    assert [len(part) for part in views] == [6, 2]
    assert len({view.numpy().tobytes() for part in views for view in part}) == 8
