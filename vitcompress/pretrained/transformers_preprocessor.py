"""Translate a preprocessor_config.json of transformers to timm's data config.

Every field is read, known to change no pixel, or refused. Fields that are missing have the defaults
of their image processor, as in transformers 5. Nothing is imported from transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vitcompress.errors import ModelError, shorten

Fields = Mapping[str, Any]
_Size = tuple[int, int]  # rows and columns

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # by PIL's numbers
_HALF = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "default_to_square": False,
}  # fmt: skip
_COMMON = {
    "resample": 3, "do_resize": True, "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "default_to_square": True, **_HALF,
}  # fmt: skip
# defaults of transformers' image processors; `_OPTIONAL` fields work only in those that have them
_PROCESSORS: Mapping[str, Fields] = {
    "ViT": {**_COMMON, "resample": 2, "size": 224},
    "DeiT": {**_COMMON, "size": 256, "crop_size": 224, "do_center_crop": True},
    "Beit": {**_COMMON, "size": 224, "crop_size": 224},
    "Bit": {**_COMMON, **_CLIP},
    "CLIP": {**_COMMON, **_CLIP},
    "ConvNext": {**_COMMON, "size": {"shortest_edge": 384}, "default_to_square": False, "crop_pct": 224 / 256},
    "Siglip": {**_COMMON, "size": {"height": 224, "width": 224}, "default_to_square": False},
    "EfficientNet": {**_COMMON, "size": 346, "crop_size": 289, "rescale_offset": False, "include_top": True},
}
_DEFAULT_PROCESSORS = {"vit": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit", "swin": "ViT"}
_OPTIONAL = ("crop_pct", "rescale_offset", "include_top")
_SWITCHES = (
    "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "rescale_offset", "include_top",
)  # fmt: skip
_READ = frozenset({*_COMMON, *_OPTIONAL, "size", "crop_size"})
_HARMLESS = frozenset({  # they change no pixel of an image that is given as a file
    "image_processor_type", "feature_extractor_type", "processor_class", "transformers_version", "do_convert_rgb",
    "input_data_format", "return_tensors", "device", "disable_grouping", "image_seq_length", "do_reduce_labels",
    "reduce_labels", "use_fast", "backend", "model_input_names", "_valid_processor_keys", "_valid_kwargs_names",
    "_processor_class", "_commit_hash", "_name_or_path", "name_or_path",
})  # fmt: skip
_CONVNEXT_SQUASH = 384  # from this size on, ConvNext's processor changes the shape instead of cropping
_HINT = (
    "Correct the file, or remove it and say what the model was trained with: --mean, --std, --interpolation, "
    "--crop-pct, --crop-mode."
)


def read_preprocessor(
    preprocessor: Fields, *, model_type: str, channels: int, image_size: _Size
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields of timm's data config that a preprocessor_config.json determines.

    Args:
        preprocessor: its content.
        model_type: `model_type` of the model's config.json, for the default image processor.
        channels: number of the model's channels.
        image_size: rows and columns of the model's images.

    Returns:
        Data config, and notes on fields that transformers ignores.

    Raises:
        ModelError: timm cannot prepare images as the file says, or it has an unknown field.
    """
    kind = _kind(preprocessor, model_type)
    given = {name: value for name, value in preprocessor.items() if value is not None}
    fields = {**_PROCESSORS[kind], **given}
    _check_known(given, kind)
    crop_mode, resized, size = _geometry(fields, kind, image_size)
    _check_padding(given, size)
    mean, std = _normalization(fields, kind, channels)
    config = {
        "input_size": (channels, *size),
        "interpolation": _interpolation(fields["resample"]),
        "crop_mode": crop_mode,
        "crop_pct": _crop_pct(size, resized),
        "mean": mean,
        "std": std,
    }
    ignored = [name for name in _OPTIONAL if given.get(name) and name not in _PROCESSORS[kind]]
    notes = [f"{name} in preprocessor_config.json has no effect: {kind}ImageProcessor ignores it." for name in ignored]
    if not fields["do_resize"]:
        notes.append(f"Images are meant to have {size[0]} x {size[1]} px already (do_resize: false); others get it.")
    return config, tuple(notes)


def _refused(text: str) -> ModelError:
    return ModelError(f"its preprocessor_config.json: {text}.", hint=_HINT)


def _kind(preprocessor: Fields, model_type: str) -> str:
    """Return the key of `_PROCESSORS` that a file names, or that its model has by default."""
    name = preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type")
    if name is None:
        return _DEFAULT_PROCESSORS[model_type]
    match = re.fullmatch(r"(\w+?)(ImageProcessor|FeatureExtractor)(Fast|Pil)?", str(name))
    if match is None or match[1] not in _PROCESSORS:
        raise _refused(f"its image processor, {str(name)[:80]}, is not one of {shorten(_PROCESSORS)}")
    return match[1]


def _check_known(given: Fields, kind: str) -> None:
    """Refuse fields that are unknown, or that change images in a way that timm has not.

    Raises:
        ModelError: there is one.
    """
    if given.get("do_flip_channel_order"):
        raise _refused("do_flip_channel_order is true, but images are red, green, blue here")
    if "auto_map" in given:
        raise _refused("auto_map names code of its own, which is not run")
    if str(given.get("data_format", "channels_first")).lower().rpartition(".")[2] not in ("channels_first", "first"):
        raise _refused(f"data_format {str(given['data_format'])[:40]!r} is not channels_first")
    known = {*_READ, *_HARMLESS, "do_flip_channel_order", "data_format", "do_pad", "pad_size"}
    unknown = sorted(name for name, value in given.items() if name not in known and value is not False)
    if unknown:
        raise _refused(f"fields that are not known for {kind}ImageProcessor: {shorten(unknown)}")
    for name in _SWITCHES:
        if not isinstance(given.get(name, False), bool):
            raise _refused(f"{name} is {str(given[name])[:40]!r}, not true or false")


# --- size and crop


def _geometry(fields: Fields, kind: str, image_size: _Size) -> tuple[str, _Size, _Size]:
    """Return timm's crop mode, the size that images are resized to, and the size of their crop."""
    crop = _rows_columns("crop_size", fields.get("crop_size")) if fields["do_center_crop"] else None
    if not fields["do_resize"]:
        if crop:
            raise _refused("do_center_crop without do_resize crops images that were not resized")
        return "squash", image_size, image_size
    edge = _shortest_edge(fields)
    if kind == "ConvNext":
        return _convnext_geometry(fields, edge, crop)
    if edge is None:
        resized = _rows_columns("size", fields["size"])
        return "squash", resized, crop or resized
    if crop is None:
        raise _refused("size names the shortest edge only and there is no do_center_crop: images keep their shapes")
    if crop[0] != crop[1]:
        raise _refused(f"crop_size {crop[0]} x {crop[1]} is not square, and size names the shortest edge only")
    return "center", (edge, edge), crop


def _convnext_geometry(fields: Fields, edge: int | None, crop: _Size | None) -> tuple[str, _Size, _Size]:
    """Do what `_geometry` does, for ConvNext's processor, which crops by a fraction of its own."""
    if edge is None or crop is not None:
        raise _refused("ConvNextImageProcessor needs a size with shortest_edge, and no do_center_crop")
    pct = _number("crop_pct", fields["crop_pct"])
    if not 0.1 <= pct <= 10:
        raise _refused(f"crop_pct is {pct:g}, no fraction of the resized image")
    if edge >= _CONVNEXT_SQUASH:
        return "squash", (edge, edge), (edge, edge)
    resized = int(edge / pct)
    return "center", (resized, resized), (edge, edge)


def _shortest_edge(fields: Fields) -> int | None:
    """Return the length of the shorter side after resizing; None if `size` has rows and columns.

    Raises:
        ModelError: `size` has other keys, like a longest edge.
    """
    size = fields["size"]
    if isinstance(size, Mapping):
        keys = {key for key, value in size.items() if value is not None}
        if keys not in ({"height", "width"}, {"shortest_edge"}):
            raise _refused(f"size has the keys {shorten(sorted(map(str, keys)))}; timm knows no such resizing")
        return _pixels("size", size["shortest_edge"]) if "shortest_edge" in keys else None
    if isinstance(size, (list, tuple)) or fields["default_to_square"]:
        return None
    return _pixels("size", size)


def _rows_columns(name: str, size: Any) -> _Size:
    """Return the rows and columns of a size: `{height, width}`, a pair, or one number for both."""
    if isinstance(size, Mapping) and {key for key, value in size.items() if value is not None} == {"height", "width"}:
        size = (size["height"], size["width"])
    elif isinstance(size, int):
        size = (size, size)
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise _refused(f"{name} {str(size)[:60]} is no height and width")
    return _pixels(name, size[0]), _pixels(name, size[1])


def _pixels(name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value <= 1 << 16:
        raise _refused(f"{name} is {str(value)[:40]}, no number of pixels")
    return value


def _crop_pct(size: _Size, resized: _Size) -> float:
    """Return the fraction for which timm, which rounds down, resizes to `resized` before it crops.

    Raises:
        ModelError: there is none.
    """
    pairs = list(zip(size, resized, strict=True))
    high = min(crop / side for crop, side in pairs)
    low = max(crop / (side + 1) for crop, side in pairs)
    for pct in (high, math.nextafter(high, 0), (low + high) / 2):
        if 0.1 <= pct <= 10 and all(math.floor(crop / pct) == side for crop, side in pairs):
            return pct
    raise _refused(f"timm cannot resize to {resized[0]} x {resized[1]} px and crop {size[0]} x {size[1]} px of it")


def _check_padding(given: Fields, size: _Size) -> None:
    """Refuse padding to another size than images have after the crop.

    Raises:
        ModelError: images are padded.
    """
    pad_size = given.get("pad_size")
    if given.get("do_pad") and pad_size is not None and _rows_columns("pad_size", pad_size) != size:
        raise _refused(f"do_pad pads images of {size[0]} x {size[1]} px to pad_size {str(pad_size)[:60]}")


def _interpolation(resample: Any) -> str:
    if type(resample) is not int or resample not in _INTERPOLATIONS:
        raise _refused(f"resample {str(resample)[:40]!r} is not one of PIL's numbers, 0 to 5")
    return _INTERPOLATIONS[resample]


# --- scale and normalization


def _normalization(fields: Fields, kind: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation for pixels from 0 to 1, as timm has them.

    transformers computes (f·p − o − mean) / std of pixels p from 0 to 255, with f the rescale
    factor and an offset o. Without normalization mean is 0 and std is 1. timm computes
    (p / 255 − m) / s. So m = (mean + o) / 255f and s = std / 255f.
    """
    factor = _number("rescale_factor", fields["rescale_factor"]) if fields["do_rescale"] else 1.0
    if not factor > 0:
        raise _refused(f"rescale_factor is {factor:g}, not above 0")
    scale = 255 * factor
    offset = 1.0 if fields["do_rescale"] and kind == "EfficientNet" and fields["rescale_offset"] else 0.0
    mean, std = (0.0,) * channels, (1.0,) * channels
    if fields["do_normalize"]:
        mean, std = (_statistics(name, fields[name], channels) for name in ("image_mean", "image_std"))
    if kind == "EfficientNet" and fields["include_top"]:  # it divides by the deviations again
        again = _statistics("image_std", fields["image_std"], channels)
        std = tuple(first * second for first, second in zip(std, again, strict=True))
    return tuple((value + offset) / scale for value in mean), tuple(value / scale for value in std)


def _statistics(name: str, value: Any, channels: int) -> tuple[float, ...]:
    """Return a number per channel; one number is repeated.

    Raises:
        ModelError: there is another number of values, or a deviation is not above 0.
    """
    values: Sequence[Any] = value if isinstance(value, (list, tuple)) and value else (value,)
    numbers = tuple(_number(name, item) for item in values)
    if len(set(numbers)) == 1:
        numbers = numbers[:1] * channels
    if len(numbers) != channels:
        raise _refused(f"{name} has {len(numbers)} values; the model has {channels} channels")
    if name == "image_std" and not min(numbers) >= 1e-6:
        raise _refused(f"{name} is {shorten(f'{number:g}' for number in numbers)}: deviations are above 0")
    return numbers


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e6:
        raise _refused(f"{name} is {str(value)[:40]!r}, no plausible number")
    return float(value)
