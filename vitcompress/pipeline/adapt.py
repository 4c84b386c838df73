"""Give a student another head or image size without making it larger."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vitcompress.errors import RecipeError
from vitcompress.families.outputs import tell_outputs
from vitcompress.plans.model import Plan
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.resolve import Source
from vitcompress.surgery import tie_group


def adapted_source(source: Source, *, num_classes: int | None, img_size: int | None) -> Source:
    """Return a source with another head or image size; reads no weights.

    Args:
        source: a model that timm can build.
        num_classes: K of the new head; None to keep the head.
        img_size: rows and columns of an image, in pixels; None to keep the size.

    Raises:
        RecipeError: the model does not support the size.
    """
    model_args = dict(source.model_args)
    if img_size is not None:
        model: Any = empty_model(source)
        size = (img_size, img_size)
        if not hasattr(model, "set_input_size"):
            raise RecipeError(
                f"--img-size {img_size}: {source.name} does not support another image size.", hint="Leave it out."
            )
        if tuple(model.patch_embed.img_size) != size:
            _check_patches(model, img_size)
            with torch.device("meta"):
                model.set_input_size(img_size=size)
            _check_windows(model, img_size)
            model_args |= {  # as timm records the resize: windows grow with the image
                name: model._model_args[name] for name in ("img_size", "window_size") if name in model._model_args
            }
    if num_classes is None:
        return replace(source, model_args=model_args)
    cfg = {name: value for name, value in source.pretrained_cfg.items() if not name.startswith("label_")}
    if "num_classes" in cfg:
        cfg["num_classes"] = num_classes
    return replace(source, model_args={**model_args, "num_classes": num_classes}, pretrained_cfg=cfg, outputs=None)


def adapt_student(student: nn.Module, plan: Plan, *, num_classes: int | None, img_size: int | None) -> None:
    """Give a student another head or image size, in place.

    timm resamples position embeddings and tables of relative positions. It gives each block a new
    table, so shared tables are tied again.

    Args:
        student: a student that was loaded from an artifact.
        plan: the student's plan.
        num_classes: K of the new head, which starts as timm starts it; None to keep the head.
        img_size: rows and columns of an image, in pixels; None to keep the size.
    """
    model: Any = student
    if img_size is not None and tuple(model.patch_embed.img_size) != (img_size, img_size):
        with warnings.catch_warnings():  # torch warns about indexing in timm's interpolation; tests check its values
            warnings.filterwarnings("ignore", category=UserWarning, module=r"timm\.layers\.interpolate")
            model.set_input_size(img_size=(img_size, img_size))
    if num_classes is not None:
        model.reset_classifier(num_classes)
        tell_outputs(model, None, name="")  # labels name classes, whatever the old head gave
    for group in plan.groups:
        tie_group(student, group)


def _check_patches(model: Any, img_size: int) -> None:
    """Make sure that patches cover the image.

    Raises:
        RecipeError: the patch size does not divide the image size.
    """
    patch = max(model.patch_embed.patch_size)
    if all(img_size % side == 0 for side in model.patch_embed.patch_size) and img_size >= patch:
        return
    below, above = _multiples(img_size, patch)
    raise RecipeError(
        f"--img-size {img_size}: not a multiple of the patch size {patch}.", hint=f"Use {below} or {above}."
    )


def _check_windows(model: Any, img_size: int) -> None:
    """Make sure that windows tile the grid of every stage; timm would attend to padding.

    Raises:
        RecipeError: the windows of a stage do not tile its grid.
    """
    for number, stage in enumerate(getattr(model, "layers", ())):
        for block in stage.blocks:
            grid, window = block.input_resolution, block.window_size
            if any(size % side for size, side in zip(grid, window, strict=True)):
                below, above = _multiples(img_size, model.feature_info[-1]["reduction"])
                raise RecipeError(
                    f"--img-size {img_size}: windows of {window[0]}×{window[1]} do not tile the {grid[0]}×{grid[1]} "
                    f"patches of stage {number}.",
                    hint=f"Use {below} or {above}.",
                )


def _multiples(number: int, of: int) -> tuple[int, int]:
    """Return the multiples of `of` below and above a number, the lower one at least `of`."""
    below = max(of, number // of * of)
    return below, below + of
