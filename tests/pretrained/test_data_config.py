"""Data configs of models: overrides, channels and input size."""

from typing import Any

import pytest

from tests.conftest import ARCHITECTURE
from tests.factories import tiny
from vitcompress.errors import RecipeError
from vitcompress.pretrained.data_config import data_config
from vitcompress.recipe import ModelRecipe


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9}),
        ({"mean": (0.1, 0.2, 0.3)}, {"mean": (0.1, 0.2, 0.3), "std": (0.5,) * 3}),
        ({"std": (0.2,)}, {"std": (0.2,) * 3}),
        ({"interpolation": "bilinear", "crop_pct": 1.0}, {"interpolation": "bilinear", "crop_pct": 1.0}),
    ],
)
def test_the_data_config_can_be_overridden(recipe: dict[str, Any], expected: dict[str, Any]) -> None:
    config = data_config(tiny(), ModelRecipe(ARCHITECTURE, **recipe))
    assert {name: config[name] for name in expected} == expected
    assert config["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("wrong", [{"mean": (0.5, 0.5)}, {"std": (0.5, 0.5)}], ids=str)
def test_a_wrong_number_of_channels_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"--{next(iter(wrong))} has 2 values; the model has 3 channels"):
        data_config(tiny(), ModelRecipe(ARCHITECTURE, **wrong))


def test_the_input_size_is_that_of_the_model_not_of_its_config() -> None:
    model = tiny("grey", img_size=(32, 48))
    config = data_config(model, ModelRecipe(ARCHITECTURE))
    assert (config["input_size"], config["mean"], config["std"]) == ((1, 32, 48), (0.5,), (0.5,))
