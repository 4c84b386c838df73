"""Helpers of these tests: open image sets and look into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import draw_image
from vitcompress.data.classes import ModelClasses
from vitcompress.data.loaders import training_loader
from vitcompress.data.open import open_sets, open_to_evaluate
from vitcompress.data.sets import ImageSet
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe

RGB: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
}


GREY: dict[str, Any] = {**RGB, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}


def class_folders(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        draw_image(root / name / "x.png", number)
    return root


def open_folder(root: Path, num_classes: int | None, class_map: Path | None = None) -> ImageSet:
    return open_to_evaluate(str(root), "--data", DataRecipe(class_map=class_map), None, ModelClasses(num_classes))


def folder_set(root: Path) -> ImageSet:
    return open_folder(root, 5)


def opened(data: str, num_classes: int | None = 5, **recipe: Any) -> tuple[ImageSet, ImageSet]:
    train, val = open_sets(DataRecipe(data=data, **recipe), bundle=None, model=ModelClasses(num_classes), seed=0)
    assert train is not None
    assert val is not None
    return train, val


def labels(images: ImageSet) -> list[int]:
    assert images.labels is not None
    return [images.labels[i] for i in images.indices]


def pixels(images: ImageSet) -> list[bytes]:
    return [images.reader.open(i).convert("RGB").tobytes() for i in images.indices]


def seen(images: ImageSet, num_workers: int) -> list[torch.Tensor]:
    recipe = DataRecipe(batch_size=4, num_workers=num_workers)
    return [batch.images for batch in training_loader(images, RGB, recipe, seed=1, num_steps=4)]


def refused(data: str, message: str, hint: str = "", **recipe: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(data, **recipe)
    assert hint in caught.value.hint
