"""What a request leaves open is settled by the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitcompress.pipeline.prepare import with_batch_size
from vitcompress.recipe import DataRecipe, ModelRecipe, Recipe, RunRecipe


@pytest.mark.parametrize(
    ("given", "device", "has_gpu", "images"),
    [(None, "auto", True, 128), (None, "auto", False, 32), (None, "cpu", True, 32), (7, "cpu", False, 7)],
)
def test_a_step_is_of_fewer_images_on_a_cpu(
    given: int | None, device: Any, has_gpu: bool, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    recipe = Recipe(ModelRecipe("deit_tiny"), data=DataRecipe(batch_size=given), run=RunRecipe(device=device))
    assert with_batch_size(recipe).data.batch_size == images
