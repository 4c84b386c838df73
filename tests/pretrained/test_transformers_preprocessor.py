"""A preprocessor_config.json gives the same pixels as in transformers, or is refused."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from vitcompress.errors import ModelError
from vitcompress.pretrained.transformers_preprocessor import read_preprocessor

BASE: dict[str, Any] = {
    "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "image_processor_type": "ViTImageProcessor",
}  # fmt: skip
CENTER: dict[str, Any] = {**BASE, "size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32}
STATISTICS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
CONVNEXT = {**BASE, "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}}
EFFICIENT = {**BASE, **STATISTICS, "image_processor_type": "EfficientNetImageProcessor", "rescale_factor": 1 / 127.5}

# content of the file, and what it says in timm's terms
EXACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "squash": (BASE, {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"}),
    "fast": ({**BASE, "image_processor_type": "ViTImageProcessorFast", "disable_grouping": None}, {}),
    "an old name": ({**BASE, "image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"}, {}),
    "a size of one number": ({**BASE, "size": 32}, {"crop_mode": "squash"}),
    "a size of two numbers": ({**BASE, "size": [32, 32]}, {"crop_mode": "squash"}),
    "not square": ({**BASE, "size": {"height": 32, "width": 48}}, {"input_size": (3, 32, 48)}),
    "statistics": ({**BASE, **STATISTICS}, {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}),
    "one number for all channels": ({**BASE, "image_mean": 0.25, "image_std": 0.5}, {"mean": (0.25,) * 3}),
    "no normalization": ({**BASE, "do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
    "no rescaling": (
        {**BASE, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [63.75] * 3},
        {"mean": (0.5,) * 3, "std": (0.25,) * 3},
    ),
    "raw pixels": ({**BASE, "do_rescale": False, "do_normalize": False}, {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}),
    "another factor": (
        {**BASE, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    ),
    "another factor alone": ({**BASE, "rescale_factor": 1 / 127.5, "do_normalize": False}, {"std": (0.5,) * 3}),
    **{
        f"resample {number}": ({**BASE, "resample": number}, {"interpolation": name})
        for number, name in enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"))
    },
    "center crop": (CENTER, {"crop_mode": "center", "crop_pct": 0.8}),
    "center crop of the whole": ({**CENTER, "size": {"shortest_edge": 32}}, {"crop_mode": "center", "crop_pct": 1.0}),
    "center crop with borders": ({**CENTER, "size": {"shortest_edge": 28}}, {"crop_pct": 32 / 28}),
    "an edge that a quotient misses": ({**CENTER, "size": {"shortest_edge": 57}}, {"crop_mode": "center"}),
    "squash and crop": ({**CENTER, "size": {"height": 40, "width": 40}}, {"crop_mode": "squash", "crop_pct": 0.8}),
    "squash and crop, not square": (
        {**CENTER, "size": {"height": 40, "width": 60}, "crop_size": {"height": 32, "width": 48}}, {"crop_pct": 0.8},
    ),
    "DeiT's defaults": ({"image_processor_type": "DeiTImageProcessor"}, {"crop_mode": "squash", "crop_pct": 0.875}),
    "BiT's defaults": ({"image_processor_type": "BitImageProcessor"}, {"crop_mode": "center", "crop_pct": 1.0}),
    "CLIP's, a number is the edge": (
        {**CENTER, "image_processor_type": "CLIPImageProcessor", "size": 40}, {"crop_mode": "center", "crop_pct": 0.8},
    ),
    "BEiT's, no segmentation": ({**BASE, "image_processor_type": "BeitImageProcessor", "do_reduce_labels": True}, {}),
    "ConvNext's crop": ({**CONVNEXT, "crop_pct": 0.8}, {"crop_mode": "center", "crop_pct": 0.8}),
    "ConvNext's default crop": (CONVNEXT, {"crop_mode": "center"}),
    "ConvNext's squash": ({**CONVNEXT, "size": {"shortest_edge": 384}}, {"crop_mode": "squash", "crop_pct": 1.0}),
    "EfficientNet's": ({**EFFICIENT, "include_top": False}, {}),
    "EfficientNet's offset": (
        {**EFFICIENT, "include_top": False, "rescale_offset": True, "do_normalize": False},
        {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    ),
    "EfficientNet's offset and top": ({**EFFICIENT, "include_top": True, "rescale_offset": True}, {}),
    "SigLIP's": ({**BASE, "image_processor_type": "SiglipImageProcessor", "do_convert_rgb": True}, {}),
    "already its size": ({**BASE, "do_resize": False}, {"crop_mode": "squash"}),
}  # fmt: skip


def read(fields: dict[str, Any], model_type: str = "vit") -> tuple[dict[str, Any], tuple[str, ...]]:
    size = fields.get("size")
    is_pair = isinstance(size, dict) and "height" in size and not fields.get("do_center_crop")
    image_size = (size["height"], size["width"]) if is_pair else (32, 32)  # type: ignore[index]
    return read_preprocessor(fields, model_type=model_type, channels=3, image_size=image_size)


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def seen_by_transformers(fields: dict[str, Any], image: Image.Image) -> Tensor:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers", minversion="5.0")  # older ones have other defaults
    name = str(fields.get("image_processor_type") or fields.get("feature_extractor_type"))
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    prepared: Tensor = kind(**fields)(image, return_tensors="pt")["pixel_values"][0]
    return prepared.float()


@pytest.mark.parametrize("case", EXACT)
def test_images_have_the_pixels_that_transformers_gives_them(case: str) -> None:
    fields, expected = EXACT[case]
    config, _ = read(fields)
    for name, value in expected.items():
        assert config[name] == (pytest.approx(value) if name in ("mean", "std", "crop_pct") else value)
    # sides for which both crop at the same pixel: of half a pixel, timm rounds to even and
    # transformers rounds down
    sizes = ((32, 32), (32, 32)) if fields.get("do_resize") is False else ((60, 40), (40, 60), (96, 96))
    for width, height in sizes:
        image = photo(width, height)
        ours = create_transform(**config, is_training=False)(image)
        theirs = seen_by_transformers(fields, image)
        assert ours.shape == theirs.shape
        deviation = torch.tensor(config["std"]).view(3, 1, 1)
        assert float(((ours - theirs) * deviation * 255).abs().max()) < 0.01  # of one step of a pixel


def test_the_default_processor_is_that_of_the_model() -> None:
    assert read({}, "swin")[0]["crop_mode"] == "squash"
    dino = read({"crop_size": 32}, "dinov2")[0]
    assert (dino["crop_mode"], dino["crop_pct"]) == ("center", 32 / 224)
    assert dino["mean"] == (0.48145466, 0.4578275, 0.40821073)


def test_a_gray_model_has_one_value() -> None:
    gray = {**BASE, "image_mean": [0.25], "image_std": 0.5}
    config, _ = read_preprocessor(gray, model_type="vit", channels=1, image_size=(32, 32))
    assert (config["input_size"], config["mean"], config["std"]) == ((1, 32, 32), (0.25,), (0.5,))


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"crop_pct": 0.9}, "crop_pct in preprocessor_config.json has no effect: ViTImageProcessor ignores it."),
        ({"rescale_offset": True}, "rescale_offset in preprocessor_config.json has no effect"),
        ({"do_resize": False}, "Images are meant to have 32 x 32 px already"),
        ({"crop_pct": None, "rescale_offset": False, "my_flag": None, "do_pad": True, "processor_class": "x"}, None),
        ({"do_pad": True, "pad_size": {"height": 32, "width": 32}, "data_format": "channels_first"}, None),
    ],
    ids=str,
)
def test_fields_without_effect_are_told_or_harmless(change: dict[str, Any], note: str | None) -> None:
    config, notes = read({**BASE, **change})
    assert config == read(BASE)[0]
    assert len(notes) == (note is not None)
    assert all(text.startswith(str(note)) for text in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_such": 3}, "fields that are not known for ViTImageProcessor: no_such"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is true"),
        ({"auto_map": {"AutoImageProcessor": "x.Y"}}, "auto_map names code of its own"),
        ({"data_format": "channels_last"}, "data_format 'channels_last' is not channels_first"),
        ({"image_processor_type": "PoolFormerImageProcessor"}, "PoolFormerImageProcessor, is not one of ViT, DeiT"),
        ({"image_processor_type": ["x"]}, "is not one of ViT, DeiT"),
        ({"size": {"shortest_edge": 32}}, "images keep their shapes"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "size has the keys longest_edge, shortest_edge"),
        ({"size": {"max_height": 32, "max_width": 64}}, "size has the keys max_height, max_width"),
        ({"size": "large"}, "size large is no height and width"),
        ({"size": [32, 0]}, "size is 0, no number of pixels"),
        ({"size": True}, "size is True"),
        ({"do_center_crop": True, "do_resize": False, "crop_size": 32}, "do_center_crop without do_resize"),
        ({"do_center_crop": True}, "crop_size None is no height and width"),
        ({"do_center_crop": True, "crop_size": [32, 48], "size": {"shortest_edge": 48}}, "32 x 48 is not square"),
        ({"do_center_crop": True, "crop_size": [32, 32], "size": [32, 48]}, "timm cannot resize to 32 x 48 px"),
        ({"do_center_crop": True, "crop_size": 32, "size": {"shortest_edge": 32000}}, "timm cannot resize to 32000"),
        ({"do_pad": True, "pad_size": 64}, "do_pad pads images of 32 x 32 px to pad_size 64"),
        ({"resample": 6}, "resample '6' is not one of PIL's numbers"),
        ({"resample": "bicubic"}, "resample 'bicubic' is not one of PIL's numbers"),
        ({"rescale_factor": 0}, "rescale_factor is 0, not above 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255', no plausible number"),
        ({"do_normalize": "false"}, "do_normalize is 'false', not true or false"),
        ({"image_mean": [0.5, 0.4]}, "image_mean has 2 values; the model has 3 channels"),
        ({"image_mean": []}, r"image_mean is '\[\]', no plausible number"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std is 0.5, 0.5, 0: deviations are above 0"),
        ({"image_std": [-0.5] * 3}, "deviations are above 0"),
        ({"image_std": [float("inf")] * 3}, "image_std is 'inf', no plausible number"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "ConvNextImageProcessor needs a size with shortest_edge"),
        ({**CONVNEXT, "crop_pct": 0}, "crop_pct is 0, no fraction"),
    ],
    ids=str,
)
def test_what_timm_cannot_do_is_refused_by_its_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read({**BASE, **change})
    assert "--crop-mode" in caught.value.hint
