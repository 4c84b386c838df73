"""Build tiny models, their students and saved weights for the tests.

`tiny` makes plain ViTs and their variants. `ROWS` lists models of every family for `build`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitcompress.plans.make import make_plan
from vitcompress.plans.model import Plan
from vitcompress.recipe import PlanRecipe
from vitcompress.surgery import apply_plan

ARGS: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "in_chans": 3, "num_classes": 5, "embed_dim": 24, "depth": 4, "num_heads": 3,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer-scale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"num_classes": 5}),
    "swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 2.0, "num_classes": 5}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "no-class-token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "grey": ("vit_tiny_patch16_224", {"in_chans": 1}),
}


def tiny(variant: str = "vit", **more: Any) -> nn.Module:
    """Build a model of `VARIANTS` with the same random weights each time, in eval mode."""
    name, args = VARIANTS[variant]
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **{**ARGS, **args, **more})
    for p in model.parameters():  # timm starts vectors at constants; zeros would hide swapped tensors
        if p.ndim <= 1:
            nn.init.normal_(p, mean=p.detach().mean().item(), std=0.1)
    return model.eval()


def images(model: nn.Module, count: int = 2) -> Tensor:
    """Return a batch of noise of the shape that `model` takes."""
    channels = model.patch_embed.proj.in_channels  # type: ignore[union-attr]
    size = model.patch_embed.img_size  # type: ignore[union-attr]
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))  # type: ignore[misc, arg-type]


def compressed(model: nn.Module, **recipe: Any) -> tuple[nn.Module, Plan]:
    """Return a student of `model` and its plan; `model` itself stays as it is."""
    plan = make_plan(model, PlanRecipe(**recipe), name="tiny")
    return student_of(model, plan).eval(), plan


@dataclass(frozen=True)
class Row:
    """A model that must be compressible: a timm architecture and arguments that make it tiny."""

    family: str
    architecture: str
    args: Mapping[str, Any]
    image: tuple[int, int] = (32, 32)

    @property
    def transforms(self) -> tuple[str, ...]:
        """Transformations that its blocks can have."""
        return ("heads", "mlp", "rpe") if self.family == "vit" else ("heads", "mlp")


VIT_ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}
SWIN_ARGS: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 4, 2), "num_heads": (2, 4, 8), "window_size": 4,
    "num_classes": 5,
}  # fmt: skip  # grids of 16, 8 and 4 patches: the last stage is one window, so it has no shift

ROWS = {
    "vit": Row("vit", "vit_tiny_patch16_224", VIT_ARGS),
    "vit dynamic": Row("vit", "vit_tiny_patch16_224", {**VIT_ARGS, "dynamic_img_size": True}, image=(16, 64)),
    "deit": Row("vit", "deit_tiny_patch16_224", VIT_ARGS),
    "deit distilled": Row("vit", "deit_tiny_distilled_patch16_224", VIT_ARGS),
    "deit3": Row("vit", "deit3_small_patch16_224", VIT_ARGS),
    "dinov2": Row("vit", "vit_small_patch14_dinov2", VIT_ARGS),
    "dinov2 registers": Row("vit", "vit_small_patch14_reg4_dinov2", VIT_ARGS),
    "dinov2 swiglu": Row("vit", "vit_giant_patch14_dinov2", VIT_ARGS),
    "clip": Row("vit", "vit_base_patch32_clip_224", VIT_ARGS),
    "clip quickgelu": Row("vit", "vit_base_patch32_clip_quickgelu_224", VIT_ARGS),
    "siglip": Row("vit", "vit_base_patch16_siglip_224", VIT_ARGS),
    "siglip gap": Row("vit", "vit_base_patch16_siglip_gap_224", VIT_ARGS),
    "headless": Row("vit", "vit_tiny_patch16_224", {**VIT_ARGS, "num_classes": 0}),
    "headless siglip": Row("vit", "vit_base_patch16_siglip_224", {**VIT_ARGS, "num_classes": 0}),
    "headless tokens": Row("vit", "vit_tiny_patch16_224", {**VIT_ARGS, "num_classes": 0, "global_pool": ""}),
    "swin": Row("swin", "swin_tiny_patch4_window7_224", SWIN_ARGS),
    "swin padded": Row("swin", "swin_tiny_patch4_window7_224", {**SWIN_ARGS, "img_size": 40}, image=(40, 40)),
    "swin dynamic": Row(
        "swin", "swin_tiny_patch4_window7_224", {**SWIN_ARGS, "strict_img_size": False}, image=(16, 64)
    ),
    "swin s3": Row("swin", "swin_s3_tiny_224", {**SWIN_ARGS, "window_size": (4, 8, 4)}),
    "swin headless": Row("swin", "swin_tiny_patch4_window7_224", {**SWIN_ARGS, "num_classes": 0}),
    "swin v2": Row("swin_v2", "swinv2_tiny_window8_256", SWIN_ARGS),
    "swin v2 padded": Row("swin_v2", "swinv2_tiny_window8_256", {**SWIN_ARGS, "img_size": 40}, image=(40, 40)),
    "beit": Row("beit", "beit_base_patch16_224", VIT_ARGS),
    "beit v2": Row("beit", "beitv2_base_patch16_224", VIT_ARGS),
    "beit shared bias": Row(
        "beit", "beit_base_patch16_224", {**VIT_ARGS, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    ),
    "beit swiglu": Row("beit", "beit_base_patch16_224", {**VIT_ARGS, "swiglu_mlp": True, "scale_mlp": True}),
    "beit no biases": Row("beit", "beit_base_patch16_224", {**VIT_ARGS, "qkv_bias": False}),
    "eva": Row("eva", "eva_giant_patch14_224", VIT_ARGS),
    "eva02": Row("eva", "eva02_tiny_patch14_224", VIT_ARGS),
    "eva02 split": Row("eva", "eva02_base_patch14_224", VIT_ARGS),
    "eva02 clip": Row("eva", "eva02_base_patch16_clip_224", VIT_ARGS),
    "eva post-norm": Row("eva", "eva02_tiny_patch14_224", {**VIT_ARGS, "use_post_norm": True}),
    "dinov3": Row("eva", "vit_small_patch16_dinov3", VIT_ARGS),
    "dinov3 swiglu": Row("eva", "vit_small_plus_patch16_dinov3", VIT_ARGS),
    "dinov3 biases": Row("eva", "vit_small_patch16_dinov3_qkvb", VIT_ARGS),
    "pe core": Row("eva", "vit_pe_core_tiny_patch16_384", {**VIT_ARGS, "attn_pool_num_heads": 2}),
    "pe spatial": Row("eva", "vit_pe_spatial_tiny_patch16_512", {**VIT_ARGS, "num_classes": 0}),
    "rope mixed": Row("eva", "vit_small_patch16_rope_mixed_224", VIT_ARGS),
    "rope registers": Row("eva", "vit_base_patch16_rope_reg1_gap_256", VIT_ARGS),
    "fewer key heads": Row(
        "eva", "vit_small_patch16_rope_224",
        {**VIT_ARGS, "num_heads": 4, "qkv_fused": False, "num_kv_heads": (4, 2, 2, 4), "embed_dim": 64},
    ),
}  # fmt: skip

KINDS: dict[str, dict[str, Any]] = {
    "adapters in a cycle": {"share": 2, "pattern": "cycle", "adapter_rank": 2, "share_biases": True},
    "bases": {"share": 4, "basis": 5, "matrices": False},
    "narrow and shared": {"share": 2, "width": 0.5, "share_biases": True, "share_tables": True},
}


def build(row: Row, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the teacher of a row with every parameter random.

    timm starts biases, tables and scales at values that hide mistakes.
    """
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(row.architecture, **row.args)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return model.to(dtype).eval()


def row_images(row: Row, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a batch of noise of the shape that the row's model takes."""
    return torch.randn(2, 3, *row.image, generator=torch.Generator().manual_seed(1), dtype=dtype)


def planned(model: nn.Module, **recipe: Any) -> Plan:
    """Return the plan of a recipe given as keyword arguments."""
    return make_plan(model, PlanRecipe(**recipe), name="model")


def student_of(teacher: nn.Module, plan: Plan) -> nn.Module:
    """Return the student that `plan` makes of a copy of `teacher`."""
    student = copy.deepcopy(teacher)
    apply_plan(student, plan)
    return student


def randomise(model: nn.Module) -> None:
    """Give every parameter of `model` random values, in place."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))


def save_as_timm_does(
    folder: Path, weights: Mapping[str, Tensor], *, file: str = "model.safetensors", **config: Any
) -> Path:
    """Write a folder as timm's `save_for_hf` does: config.json and the weights."""
    folder.mkdir(parents=True)
    tree = {
        "architecture": VARIANTS["vit"][0],
        "num_classes": 5,
        "num_features": 24,
        "model_args": ARGS,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "interpolation": "bilinear",
            "crop_pct": 0.8,
            "num_classes": 5,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        **config,
    }
    (folder / "config.json").write_text(json.dumps(tree))
    if file.endswith(".safetensors"):
        save_file(dict(weights), folder / file)
    else:
        torch.save(dict(weights), folder / file)
    return folder
