"""What can be told before any weight is loaded?  Faults that several commands look for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitcompress.bundled import FASHION_VIT, Bundle
from vitcompress.data import ImageSet
from vitcompress.errors import RecipeError
from vitcompress.recipe import STORES_IN_LOOP, DistillRecipe, Recipe, StoreRecipe


def missing_images(
    recipe: Recipe, train: ImageSet | None, val: ImageSet | None, *, fitted: bool = False
) -> list[tuple[str, str]]:
    """What the recipe wants images for and has none, as `(message, hint)` pairs; `fitted`: its start wants them."""
    faults = []
    if train is None and recipe.distill.steps != 0:
        faults.append(("Distillation needs training images.", "Give --data DIR, or --steps 0 to convert only."))
    if train is None and fitted:
        what = "--start calibrated" if recipe.start.start == "calibrated" else "The start of factors and narrow blocks"
        faults.append((f"{what} needs images.", "Give --data DIR, or share whole matrices with --start first."))
    if (recipe.distill.loss or {}).get("labels") and train is not None and train.labels is None:
        faults.append(("--loss labels needs labelled images.", "Give --data DIR with class folders."))
    if recipe.gates.max_drop is not None and (val is None or val.labels is None):
        faults.append(("--max-drop needs labelled images.", "Give --val-data DIR with class folders."))
    return faults


def check_store(recipe: StoreRecipe, distill: DistillRecipe) -> None:
    """Make sure that there is something to train with, where the training shall know how weights are stored.

    Raises:
        RecipeError: there is not.
    """
    if recipe.qat_fraction and recipe.store not in STORES_IN_LOOP:
        raise RecipeError(
            f"--qat-fraction {recipe.qat_fraction:g}: --store {recipe.store} quantises nothing.",
            hint=f"Give --store {' or '.join(STORES_IN_LOOP)}, or leave it out.",
        )
    if recipe.qat_fraction and distill.steps == 0:
        raise RecipeError(
            f"--qat-fraction {recipe.qat_fraction:g}: --steps 0 trains nothing.", hint="Give a length, or leave it out."
        )


def check_out(out: Path, inputs: Mapping[str, Path | None]) -> None:
    """Make sure that `out` can be written.

    Args:
        out: where to write.
        inputs: what is read, by what the user calls it: none of it may be written over.

    Raises:
        RecipeError: it cannot.
    """
    folder = out.parent
    if not folder.is_dir():
        raise RecipeError(f"--out {out}: the folder {folder} does not exist.", hint=f"mkdir -p {folder}")
    if out.is_dir():
        raise RecipeError(f"--out {out} is a folder.", hint="Name a file, like mini.safetensors.")
    for name, path in inputs.items():
        if path is not None and out.exists() and path.exists() and out.samefile(path):
            raise RecipeError(f"--out {out} would overwrite {name}.", hint="Name another file.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(f"--out {out}: the folder {folder} cannot be written to: {error.strerror}.") from error


def check_device(device: str) -> None:
    """Make sure that `device` is there.

    Raises:
        RecipeError: it is not.
    """
    available: dict[str, Any] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device in available and not available[device]():
        raise RecipeError(f"--device {device} is not there.", hint="--device auto takes what there is.")


def bundle_of(model: str, classes: tuple[str, ...] = ()) -> Bundle | None:
    """The built-in images of a model; None where it has none.

    Args:
        model: its name.
        classes: names of its classes; empty where they are the model's own. Others have no images built in.
    """
    own = not classes or classes == FASHION_VIT.pretrained_cfg["label_names"]
    return FASHION_VIT if model == FASHION_VIT.name and own else None
