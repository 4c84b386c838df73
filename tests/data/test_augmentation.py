"""Augmentation changes training views, and the same seed gives the same ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vitcompress.data.loaders import training_loader
from vitcompress.data.readers import ArrayReader
from vitcompress.data.sets import ImageSet
from vitcompress.data.views import Views
from vitcompress.errors import RecipeError
from vitcompress.recipe import DataRecipe

"""What `Views` and `ShuffledBatches` do with the options of augmentation."""


EVERYTHING = {"auto_augment": "rand-m9-mstd0.5-inc1", "erase": 0.5, "repeats": 3}


def config(channels: int) -> dict[str, Any]:
    return {
        "input_size": (channels, 28, 28), "mean": (0.4,) * channels, "std": (0.3,) * channels,
        "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip


def image_set(count: int = 12) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return ImageSet("noise", ArrayReader(pixels, "noise"), tuple(range(count)), tuple(range(count)))


def views(channels: int, **recipe: Any) -> Views:
    return Views(image_set(), config(channels), training=True, recipe=DataRecipe(**recipe), seed=0)


def view(found: Views, draw: int) -> torch.Tensor:
    sample = found[0, draw].view
    assert sample is not None
    return sample


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "v0", "3a"])
def test_policies_of_timm_on_grey_and_coloured_images(channels: int, policy: str) -> None:
    plain, augmented = views(channels), views(channels, auto_augment=policy)
    differ = 0
    for draw in range(12):
        found = view(augmented, draw)
        assert found.shape == (channels, 28, 28)
        assert torch.equal(found, view(augmented, draw))
        differ += not torch.equal(found, view(plain, draw))
    assert differ >= 6


def test_full_magnitude_leaves_no_bits_and_no_error() -> None:
    """Posterize is one of fifteen operations; at magnitude 10 it asks for 0 bits."""
    found = views(3, auto_augment="rand-m10-inc1")
    assert any((view(found, draw) == view(found, draw)[:, :1, :1]).all() for draw in range(200))


def test_erasing_puts_noise_into_a_rectangle() -> None:
    plain, erased = views(3), views(3, erase=1.0)
    changed = (view(plain, 5) != view(erased, 5)).any(dim=0)
    rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
    box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box.all()
    assert 0 < changed.float().mean() < 0.5


@pytest.mark.parametrize("policy", ["nonsense", "rand-zz9"])
def test_a_policy_that_timm_has_not(policy: str) -> None:
    with pytest.raises(RecipeError, match=f"--auto-augment {policy}: timm has no such policy"):
        views(3, auto_augment=policy)


def test_augmented_views_do_not_depend_on_the_number_of_workers() -> None:
    runs = []
    for workers in (0, 2):
        recipe = DataRecipe(batch_size=6, num_workers=workers, **EVERYTHING)  # type: ignore[arg-type]
        loader = training_loader(image_set(), config(3), recipe, seed=7, num_steps=3)
        runs.append([batch.images for batch in loader])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0][0], runs[0][0][1])  # two views of one image
