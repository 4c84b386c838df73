"""Data configs of models: overrides, channels, input size, and values that cannot be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ARCHITECTURE
from tests.factories import save_as_timm_does, tiny
from vitcompress.errors import ModelError, RecipeError
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import data_config, preprocessing_notes
from vitcompress.pretrained.resolve import resolve
from vitcompress.recipe import ModelRecipe

CAFFE = (123.675, 116.28, 103.53)
CONFIG = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32], "num_classes": 5}


def of_folder(folder: Path, recipe: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Return the data config of a folder of timm whose config has these fields."""
    save_as_timm_does(folder, tiny().state_dict(), pretrained_cfg={**CONFIG, **fields})
    found = ModelRecipe(f"local-dir:{folder}", **recipe or {})
    return data_config(empty_model(resolve(found)), found)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            {},
            {
                "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9,
                "crop_mode": "center",
            },
        ),
        ({"mean": (0.1, 0.2, 0.3)}, {"mean": (0.1, 0.2, 0.3), "std": (0.5,) * 3}),
        ({"std": (0.2,)}, {"std": (0.2,) * 3}),
        ({"mean": (0.0,), "std": (1.0,)}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"interpolation": "bilinear", "crop_pct": 1.0}, {"interpolation": "bilinear", "crop_pct": 1.0}),
        ({"interpolation": "lanczos", "crop_mode": "squash"}, {"interpolation": "lanczos", "crop_mode": "squash"}),
    ],
)  # fmt: skip
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


# --- scales


@pytest.mark.parametrize(
    ("recipe", "message", "hint"),
    [
        (
            {"mean": CAFFE, "std": (58.395, 57.12, 57.375)},
            "--mean is 123.675,116.28,103.53; --std is 58.395,57.12,57.375: images have values from 0 to 1 here",
            "Divided by 255: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225.",
        ),
        ({"mean": CAFFE}, "^--mean is", "--mean 0.485,0.456,0.406 --std 0.5,0.5,0.5."),
        ({"mean": CAFFE, "std": (1.0,)}, "^--mean is", "--std 0.00392157,0.00392157,0.00392157."),
        ({"mean": (0.0,), "std": (255.0,)}, "^--std is 255,255,255", "--mean 0,0,0 --std 1,1,1."),
        ({"mean": (127.5,), "std": (127.5,)}, "--mean is", "--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5."),
        ({"mean": (-0.5,)}, "^--mean is -0.5,-0.5,-0.5", "means from 0 to 1"),
        ({"std": (0.5, 0.5, 1.5)}, "^--std is 0.5,0.5,1.5", "means from 0 to 1"),
        ({"mean": (300.0,)}, "^--mean is 300,300,300", "means from 0 to 1"),
    ],
    ids=str,
)
def test_statistics_on_another_scale_are_refused(recipe: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        data_config(tiny(), ModelRecipe(ARCHITECTURE, **recipe))
    assert hint in caught.value.hint


def test_statistics_of_a_config_on_another_scale_are_refused_until_they_are_given(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"local-dir:\S+: mean in its config is 123\.675,.*std in its config"
    ) as caught:
        of_folder(tmp_path / "a", mean=list(CAFFE), std=[58.395, 57.12, 57.375])
    assert "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225" in caught.value.hint
    given = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert of_folder(tmp_path / "b", given, mean=list(CAFFE), std=[58.395, 57.12, 57.375])["mean"] == given["mean"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": [0.5, 0.4]}, "mean in its config has 2 values; the model has 3 channels"),
        ({"std": [0.5, 0.5, 2.0]}, "std in its config is 0.5,0.5,2"),
        ({"std": [0.5, 0.5, 0.0]}, "its std is not a list of plausible numbers"),
        ({"std": [-0.5] * 3}, "its std is not a list of plausible numbers"),
        ({"mean": 0.5}, "its mean is not a list"),
        ({"interpolation": "random"}, "interpolation in its config is 'random', which evaluation cannot use"),
        ({"crop_mode": "zoom"}, "crop_mode in its config is 'zoom', which evaluation cannot use"),
        ({"crop_pct": 0}, "its crop_pct cannot be 0"),
        ({"crop_pct": "all"}, "its crop_pct cannot be all"),
        ({"crop_pct": 87.5}, "crop_pct in its config is 87.5, no fraction"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, ModelError), match=message):
        of_folder(tmp_path / "m", **fields)


def test_a_config_of_timm_is_read_in_full(tmp_path: Path) -> None:
    config = of_folder(tmp_path / "m", interpolation="hamming", crop_pct=0.8, crop_mode="border")
    assert config == {
        "input_size": (3, 32, 32), "interpolation": "hamming", "crop_pct": 0.8, "crop_mode": "border",
        "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
    }  # fmt: skip
    assert of_folder(tmp_path / "one", mean=[0.25])["mean"] == (0.25,) * 3


def test_another_size_in_the_config_is_told_unless_it_was_asked_for(tmp_path: Path) -> None:
    folder = save_as_timm_does(
        tmp_path / "m", tiny().state_dict(), pretrained_cfg={**CONFIG, "input_size": [3, 64, 64]}
    )

    def notes(**recipe: Any) -> tuple[str, ...]:
        found = ModelRecipe(f"local-dir:{folder}", **recipe)
        source = resolve(found)
        return preprocessing_notes(source, empty_model(source), found)

    (note,) = notes()
    assert "names images of 64 x 64 px, but the model is built for 32 x 32 px" in note
    assert "--model-arg img_size=64" in note
    assert notes(model_arg={"img_size": 32}) == ()


def test_a_config_beside_a_bare_checkpoint_is_not_read_and_that_is_told(tmp_path: Path) -> None:
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict(), pretrained_cfg=CONFIG)
    recipe = ModelRecipe(ARCHITECTURE, folder / "model.safetensors")
    (note,) = preprocessing_notes(resolve(recipe), tiny(), replace(recipe, model_arg={"img_size": 32}))
    assert note == (
        "config.json beside --checkpoint model.safetensors is not read; to take the preprocessing from it, name the "
        f"folder: local-dir:{folder}."
    )
