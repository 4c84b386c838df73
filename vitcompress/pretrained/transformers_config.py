"""Which timm model is a checkpoint of the transformers library, and what are its tensors called there?

    folder saved by save_pretrained              timm
    config.json               ── to_timm_model ──►  architecture, its arguments, its data config
    model.safetensors         ── to_timm_weights ─►  state dict

Pure functions of what the files hold; nothing is imported from transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vitcompress.errors import ModelError, shorten

Config = Mapping[str, Any]


@dataclass(frozen=True)
class TimmModel:
    """What timm needs to build the model of a transformers config.

    Attributes:
        architecture: timm's registered name of a model of the same construction.
        modules: timm's modules whose models have that construction.
        model_args: arguments for its constructor; every size is among them.
        pretrained_cfg: timm's data config.
    """

    architecture: str
    modules: tuple[str, ...]
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def is_transformers_config(config: Config) -> bool:
    """Whether a config.json is one of transformers and none of timm."""
    return "model_type" in config and "architecture" not in config


def to_timm_model(config: Config, preprocessor: Config | None = None, *, headless: bool = False) -> TimmModel:
    """The timm model that computes what the model of `config` does.

    Args:
        config: config.json of a folder that `save_pretrained` wrote.
        preprocessor: preprocessor_config.json, where there is one.
        headless: leave the classifier out.

    Raises:
        ModelError: no timm model computes it; every reason at once.
    """
    kind = str(config["model_type"])
    if kind not in _KINDS:
        raise ModelError(
            f"transformers' {kind!r} models are not known here.",
            hint=f"Known: {', '.join(_KINDS)}. timm may have the same model under a name of its own.",
        )
    head = _head(config)
    num_classes = 0 if headless or not head else len(config.get("id2label", (0, 1)))  # transformers' default is two
    found = _KINDS[kind](config, head if num_classes else "")
    sizes = {"num_classes": num_classes, "in_chans": config.get("num_channels", 3), "img_size": _image_size(config)}
    return TimmModel(
        found.architecture,
        found.modules,
        {**sizes, **found.model_args},
        {**found.pretrained_cfg, **_data_config(sizes, preprocessor or {}), **_labels(config, num_classes)},
    )


def _head(config: Config) -> str:
    """The class of the classifier, like `ForImageClassification`; empty where there is none."""
    name = str((config.get("architectures") or [""])[0])
    return found[0] if (found := re.search(r"ForImageClassification\w*$", name)) else ""


def _image_size(config: Config) -> tuple[int, int]:
    size = config.get("image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _data_config(sizes: Config, preprocessor: Config) -> dict[str, Any]:
    """Timm's data config, as far as preprocessor_config.json says it."""
    found: dict[str, Any] = {
        "input_size": (sizes["in_chans"], *sizes["img_size"]),
        "num_classes": sizes["num_classes"],
        "crop_pct": 1.0,
    }
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in preprocessor:
            found[ours] = tuple(preprocessor[theirs])
    if "resample" in preprocessor:  # PIL's numbers
        found["interpolation"] = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(preprocessor["resample"], "bicubic")
    edge = _edge(preprocessor.get("size"))
    crop = _edge(preprocessor.get("crop_size")) if preprocessor.get("do_center_crop") else None
    if edge and crop and crop < edge:
        found["crop_pct"] = crop / edge
    return found


def _edge(size: Any) -> int | None:
    """The shorter side that a size of transformers means: a number, `{height, width}` or `{shortest_edge}`."""
    values = [v for v in size.values() if isinstance(v, int)] if isinstance(size, dict) else [size]
    return min((v for v in values if isinstance(v, int)), default=None)


def _labels(config: Config, num_classes: int) -> dict[str, Any]:
    labels = config.get("id2label", {}) if num_classes else {}
    return {"label_names": tuple(labels[key] for key in sorted(labels, key=int))} if labels else {}


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
_VIT_MODULES = ("vision_transformer", "deit")
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
    "silu": "silu", "swish": "silu",
}  # fmt: skip


def _vit_args(config: Config) -> dict[str, Any]:
    """What the plain transformers have in common."""
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
            raise ModelError(f"hidden_act {activation!r} is unknown.", hint=f"Known: {shorten(_ACTIVATIONS)}, gelu.")
        args["act_layer"] = _ACTIVATIONS[activation]
    return args


def _norm_eps(config: Config, *, default: float, timm_default: float) -> dict[str, float]:
    """The epsilon of the norms where timm's constructor has another: small models differ visibly by it."""
    eps = float(config.get("layer_norm_eps", default))
    return {"norm_eps": eps} if eps != timm_default else {}


def _ratio(hidden: int, dim: int) -> float:
    """A ratio for which timm's `int(dim * ratio)` is `hidden`, whatever the rounding."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _vit(config: Config, head: str) -> TimmModel:
    args = {**_vit_args(config), "mlp_ratio": _ratio(config["intermediate_size"], config["hidden_size"])}
    return TimmModel("vit_base_patch16_224", _VIT_MODULES, args, _HALF)


def _deit(config: Config, head: str) -> TimmModel:
    args = {**_vit_args(config), "mlp_ratio": _ratio(config["intermediate_size"], config["hidden_size"])}
    if head == "ForImageClassificationWithTeacher":
        return TimmModel("deit_base_distilled_patch16_224", _VIT_MODULES, args, _IMAGENET)
    # the distillation token takes part without being read: what timm calls a register
    return TimmModel("deit_base_patch16_224", _VIT_MODULES, {**args, "reg_tokens": 1}, _IMAGENET)


def _dinov2(config: Config, head: str) -> TimmModel:
    if head:
        raise ModelError(
            "Its classifier reads the class token and the mean of the patches side by side, which no timm model does.",
            hint="Leave the classifier out: --model-arg num_classes=0.",
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
    packed = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)  # as Dinov2SwiGLUFFN rounds it; gate and values in one layer
    args = {**args, "mlp_ratio": _ratio(packed, dim)}
    args.pop("act_layer", None)  # the gate is SiLU whatever hidden_act says
    return TimmModel("vit_giant_patch14_dinov2", _VIT_MODULES, args, _IMAGENET)


def _swin(config: Config, head: str) -> TimmModel:
    unknown = [
        f"{name} is {config[name]!r}"
        for name, usual in (("hidden_act", "gelu"), ("use_absolute_embeddings", False))
        if config.get(name, usual) != usual
    ]
    if unknown:
        raise ModelError(f"timm has no such Swin: {', '.join(unknown)}.")
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
