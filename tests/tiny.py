"""Models small enough to test with: one set of timm arguments per family."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

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
    """A model with random weights, the same ones each time, in eval mode."""
    name, args = VARIANTS[variant]
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **{**ARGS, **args, **more})
    for p in model.parameters():  # timm starts vectors at constants, and at zero nothing can be told apart
        if p.ndim <= 1:
            nn.init.normal_(p, mean=p.detach().mean().item(), std=0.1)
    return model.eval()


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    """Noise that `model` takes."""
    channels = model.patch_embed.proj.in_channels  # type: ignore[union-attr]
    size = model.patch_embed.img_size  # type: ignore[union-attr]
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))  # type: ignore[misc, arg-type]


def compressed(model: nn.Module, **recipe: Any) -> tuple[nn.Module, Plan]:
    """A student of `model`, and its plan; `model` itself is left alone."""
    import copy

    plan = make_plan(model, PlanRecipe(**recipe), name="tiny")
    student = copy.deepcopy(model)
    apply_plan(student, plan)
    return student.eval(), plan
