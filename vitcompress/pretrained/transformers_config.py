"""Translate a folder written by transformers' `save_pretrained` to a timm model and its arguments.

Nothing is imported from transformers. `transformers_weights` translates the tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcompress.errors import CheckpointError, ModelError, shorten
from vitcompress.pretrained.config_limits import check_transformers
from vitcompress.pretrained.transformers_preprocessor import read_preprocessor
from vitcompress.pretrained.weights_file import WEIGHT_FILES, weights_in

Config = Mapping[str, Any]


@dataclass(frozen=True)
class TimmModel:
    """What timm needs to build the model of a transformers config.

    Attributes:
        architecture: timm's registered name of a model with the same structure.
        modules: timm's modules whose models have that structure.
        model_args: arguments for the model's constructor, among them every size.
        pretrained_cfg: timm's data config and label names.
        notes: what a user should know about the preprocessing.
        outputs: name of the kind of the outputs; None where the config does not tell it.
    """

    architecture: str
    modules: tuple[str, ...]
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    notes: tuple[str, ...] = ()
    outputs: str | None = None


def is_transformers_folder(folder: Path) -> bool:
    """Return whether `folder` holds a config.json of transformers."""
    try:
        config = _read_json(folder / "config.json")
    except (OSError, ValueError, RecursionError):  # whatever reads it next reports what is wrong
        return False
    return "model_type" in config and "architecture" not in config  # timm writes the latter


def read_folder(folder: Path, *, headless: bool) -> tuple[TimmModel, Path]:
    """Return the timm model of a folder and the path of its weights.

    Args:
        folder: holds config.json, model.safetensors or pytorch_model.bin or the index of their
            shards, and optionally preprocessor_config.json or processor_config.json.
        headless: whether to leave out the classifier.

    Raises:
        ModelError: its config.json cannot be read, or timm has no such model.
        CheckpointError: it has no weights.
    """
    try:
        config = _read_json(folder / "config.json")
        check_transformers(config)
        preprocessor = _read_preprocessor(folder)
        model = to_timm_model(config, preprocessor, headless=headless)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}", hint=error.hint) from error
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"{folder}: its config.json is incomplete or malformed: {repr(error)[:200]}.") from error
    weights = weights_in(folder)
    if weights is None:
        raise CheckpointError(f"{folder} has neither {' nor '.join(WEIGHT_FILES)}, nor an index of their shards.")
    return model, weights


def _read_preprocessor(folder: Path) -> dict[str, Any] | None:
    """Return the fields of a folder's image processor; None if it has none.

    Like transformers, it prefers processor_config.json, which can hold several processors.

    Raises:
        ModelError: the file cannot be read or is not a JSON object.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            continue
        try:
            fields = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"its {name} cannot be read: {repr(error)[:200]}.") from error
        if name == "processor_config.json":
            fields = fields.get("image_processor") if isinstance(fields, dict) else None
            if fields is None:
                continue
        if not isinstance(fields, dict):
            raise ModelError(f"its {name} is not a JSON object.")
        return fields
    return None


def _read_json(path: Path) -> dict[str, Any]:
    tree = json.loads(path.read_text(encoding="utf-8"))
    return tree if isinstance(tree, dict) else {}


def to_timm_model(config: Config, preprocessor: Config | None = None, *, headless: bool = False) -> TimmModel:
    """Return the timm model that computes the same function as the model of `config`.

    Args:
        config: content of config.json in a folder that `save_pretrained` wrote.
        preprocessor: content of preprocessor_config.json; None if there is none.
        headless: whether to leave out the classifier.

    Raises:
        ModelError: no timm model computes the same function.
    """
    kind = str(config["model_type"])
    if kind not in _KINDS:
        raise ModelError(
            f"transformers models of type {kind!r} are not supported.",
            hint=f"Supported types: {', '.join(_KINDS)}. timm may have the same model under its own name.",
        )
    head = _head(config)
    num_classes = 0 if headless or not head else len(config.get("id2label", (0, 1)))  # transformers' default is two
    model = _KINDS[kind](config, head if num_classes else "")
    sizes = {"num_classes": num_classes, "in_chans": config.get("num_channels", 3), "img_size": _image_size(config)}
    data_config, notes = _data_config(sizes, preprocessor, kind)
    return TimmModel(
        model.architecture,
        model.modules,
        {**sizes, **model.model_args},
        {**model.pretrained_cfg, **data_config, **_labels(config, num_classes)},
        notes,
        _outputs(config) if num_classes else None,
    )


def _head(config: Config) -> str:
    """Return the classifier in the class name, like `ForImageClassification`; empty if none."""
    name = str((config.get("architectures") or [""])[0])
    return match[0] if (match := re.search(r"ForImageClassification\w*$", name)) else ""


def _outputs(config: Config) -> str | None:
    """Return the kind of the outputs that `problem_type` names; None where it is not set.

    Raises:
        ModelError: transformers has no such type.
    """
    problem = config.get("problem_type")
    if problem is None:
        return None
    if problem not in PROBLEM_TYPES:
        raise ModelError(
            f"problem_type {problem!r} is not one of {', '.join(PROBLEM_TYPES)}.", hint="Correct it in config.json."
        )
    return PROBLEM_TYPES[problem]


def _image_size(config: Config) -> tuple[int, int]:
    size = config.get("image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _data_config(sizes: Config, preprocessor: Config | None, kind: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return those fields of timm's data config that the preprocessor determines, and notes."""
    fields: dict[str, Any] = {"input_size": (sizes["in_chans"], *sizes["img_size"]), "crop_pct": 1.0}
    notes: tuple[str, ...] = (_NO_PREPROCESSOR,)
    if preprocessor is not None:
        fields, notes = read_preprocessor(
            preprocessor, model_type=kind, channels=sizes["in_chans"], image_size=sizes["img_size"]
        )
    return {**fields, "num_classes": sizes["num_classes"]}, notes


def _labels(config: Config, num_classes: int) -> dict[str, Any]:
    labels = config.get("id2label", {}) if num_classes else {}
    return {"label_names": tuple(labels[key] for key in sorted(labels, key=int))} if labels else {}


_NO_PREPROCESSOR = (
    "There is no preprocessor_config.json, so the preprocessing is an assumption; --mean, --std, --interpolation, "
    "--crop-pct and --crop-mode correct it."
)
PROBLEM_TYPES = {
    "single_label_classification": "classes", "multi_label_classification": "multi_label", "regression": "regression",
}  # fmt: skip
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
_VIT_MODULES = ("vision_transformer", "deit")
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
    "silu": "silu", "swish": "silu",
}  # fmt: skip


def _vit_args(config: Config) -> dict[str, Any]:
    """Return the arguments that ViT, DeiT and DINOv2 have in common."""
    dim = config["hidden_size"]
    args: dict[str, Any] = {
        "patch_size": config.get("patch_size", 16),
        "embed_dim": dim,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "qkv_bias": config.get("qkv_bias", True),
        **_norm_eps(config, default=1e-12, timm_default=1e-6),
    }
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        if activation not in _ACTIVATIONS:
            raise ModelError(
                f"hidden_act {activation!r} is not supported.", hint=f"Supported: {shorten(_ACTIVATIONS)}, gelu."
            )
        args["act_layer"] = _ACTIVATIONS[activation]
    return args


def _norm_eps(config: Config, *, default: float, timm_default: float) -> dict[str, float]:
    """Return the epsilon of the norms if timm's default differs; it matters in small models."""
    eps = float(config.get("layer_norm_eps", default))
    return {"norm_eps": eps} if eps != timm_default else {}


def _ratio(hidden: int, dim: int) -> float:
    """Return a ratio for which timm's `int(dim * ratio)` is `hidden`, despite rounding."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _vit(config: Config, head: str) -> TimmModel:
    args = {**_vit_args(config), "mlp_ratio": _ratio(config["intermediate_size"], config["hidden_size"])}
    return TimmModel("vit_base_patch16_224", _VIT_MODULES, args, _HALF)


def _deit(config: Config, head: str) -> TimmModel:
    args = {**_vit_args(config), "mlp_ratio": _ratio(config["intermediate_size"], config["hidden_size"])}
    if head == "ForImageClassificationWithTeacher":
        return TimmModel("deit_base_distilled_patch16_224", _VIT_MODULES, args, _IMAGENET)
    # the distillation token is not read here, which makes it what timm calls a register
    return TimmModel("deit_base_patch16_224", _VIT_MODULES, {**args, "reg_tokens": 1}, _IMAGENET)


def _dinov2(config: Config, head: str) -> TimmModel:
    if head:
        raise ModelError(
            "Its classifier reads the class token and the mean of the patches side by side; no timm model does.",
            hint="Leave out the classifier with --model-arg num_classes=0.",
        )
    dim = config["hidden_size"]
    hidden = int(dim * config.get("mlp_ratio", 4))
    registers = config.get("num_register_tokens", 0)
    args: dict[str, Any] = {
        **_vit_args({"layer_norm_eps": 1e-6, **config}),
        "init_values": float(config.get("layerscale_value", 1.0)),
        "reg_tokens": registers,
        "no_embed_class": registers > 0,
        "mlp_ratio": _ratio(hidden, dim),
    }
    if not config.get("use_swiglu_ffn", False):
        return TimmModel("vit_base_patch14_dinov2", _VIT_MODULES, args, _IMAGENET)
    packed = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)  # rounded as in Dinov2SwiGLUFFN; gate and values in one layer
    args = {**args, "mlp_ratio": _ratio(packed, dim)}
    args.pop("act_layer", None)  # the gate is always SiLU, whatever hidden_act says
    return TimmModel("vit_giant_patch14_dinov2", _VIT_MODULES, args, _IMAGENET)


def _swin(config: Config, head: str) -> TimmModel:
    unsupported = [
        f"{name} is {config[name]!r}"
        for name, required in (("hidden_act", "gelu"), ("use_absolute_embeddings", False))
        if config.get(name, required) != required
    ]
    if unsupported:
        raise ModelError(f"timm has no such Swin: {', '.join(unsupported)}.")
    args = {
        "patch_size": config.get("patch_size", 4),
        "embed_dim": config["embed_dim"],
        "depths": tuple(config["depths"]),
        "num_heads": tuple(config["num_heads"]),
        "window_size": config.get("window_size", 7),
        "mlp_ratio": float(config.get("mlp_ratio", 4.0)),
        "qkv_bias": config.get("qkv_bias", True),
        **_norm_eps(config, default=1e-5, timm_default=1e-5),
    }
    return TimmModel("swin_base_patch4_window7_224", ("swin_transformer",), args, _IMAGENET)


_KINDS: Mapping[str, Callable[[Config, str], TimmModel]] = {
    "vit": _vit,
    "deit": _deit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "swin": _swin,
}
