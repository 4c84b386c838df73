"""Checks that several commands make before any weight is loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from vitcompress.artifact.paths import SUFFIX, check_not_an_input
from vitcompress.bundled import FASHION_VIT, Bundle
from vitcompress.data.sets import NO_LENGTH_HINT, ImageSet
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.errors import CheckpointError, RecipeError, nearest, raise_faults
from vitcompress.initialize.start import needs_images
from vitcompress.plans.model import Plan
from vitcompress.recipe import (
    BUILT_IN,
    QUANTIZED_STORES,
    DistillRecipe,
    ModelRecipe,
    Recipe,
    RunRecipe,
    StoreRecipe,
    save_interval,
)
from vitcompress.runtime.extras import install_hint, missing_packages
from vitcompress.runtime.launch import num_launched, num_processes
from vitcompress.runtime.precision import device_of


def with_images(recipe: Recipe, plan: Plan | None) -> Recipe:
    """Return the recipe with the built-in images, where it needs images and names none.

    A length in epochs needs images of the user's own.

    Args:
        recipe: what to do.
        plan: the student's plan; None where it is searched for, on images.
    """
    trains = recipe.distill.steps != 0 or bool(recipe.start.refine)
    needed = plan is None or needs_images(plan, recipe.start.start) or trains
    if recipe.data.data is not None or not needed or recipe.distill.epochs is not None:
        return recipe
    return replace(recipe, data=replace(recipe.data, data=BUILT_IN))


def unfit_images(
    recipe: Recipe, train: ImageSet | None, val: ImageSet | None, *, has_classes: bool
) -> list[tuple[str, str]]:
    """Return what the images lack for the recipe, as `(message, hint)` pairs.

    Args:
        recipe: what to do.
        train: training images.
        val: validation images.
        has_classes: whether labels name the model's outputs; otherwise what needs labels is refused
            elsewhere.
    """
    faults = []
    if train is None and recipe.distill.epochs is not None:
        hint = "Give --data DIR; or --steps, for crops of built-in photographs."
        faults.append((f"--epochs {recipe.distill.epochs:g}: there are no images to pass over.", hint))
    if has_classes and (recipe.distill.loss or {}).get("labels") and train is not None and train.labels is None:
        faults.append(("--loss labels needs labeled images.", "Give --data DIR with class folders."))
    if has_classes and recipe.gates.max_drop is not None and (val is None or val.labels is None):
        faults.append(("--max-drop needs labeled images.", "Give --val-data DIR with class folders."))
    return faults + endless_epochs(recipe, train)


def endless_epochs(recipe: Recipe, train: ImageSet | None) -> list[tuple[str, str]]:
    """Return the fault of counting epochs over a stream without end, as `(message, hint)` pairs."""
    if recipe.distill.epochs is None or train is None or not train.endless:
        return []
    return [(f"--epochs {recipe.distill.epochs:g}: {train.name} cannot be counted.", NO_LENGTH_HINT)]


def check_store(recipe: StoreRecipe, distill: DistillRecipe) -> None:
    """Make sure that quantization-aware training has a store that quantizes, and a training.

    Raises:
        RecipeError: it lacks one.
    """
    if not recipe.qat_fraction:
        return
    flag = f"--qat-fraction {recipe.qat_fraction:g}"
    if recipe.kind not in QUANTIZED_STORES:
        raise RecipeError(
            f"{flag}: --store {recipe.kind} quantizes nothing.",
            hint=f"Give --store {' or '.join(QUANTIZED_STORES)}, or leave it out.",
        )
    if distill.steps == 0:
        raise RecipeError(f"{flag}: --steps 0 trains nothing.", hint="Give --steps N, or remove --qat-fraction.")


def check_out(out: Path, inputs: Mapping[str, Path | None]) -> None:
    """Make sure that `out` can be written.

    Args:
        out: path of the artifact.
        inputs: files that are read, by their flags; none of them may be overwritten.

    Raises:
        RecipeError: it cannot be written.
    """
    if out.suffix != SUFFIX and out.parent.is_dir() and not out.is_dir():
        hint = f"Give --out {out.with_suffix(SUFFIX)}; vitcompress export writes other formats."
        raise RecipeError(f"--out {out}: the artifact is a {SUFFIX} file.", hint=hint)
    check_writable("--out", out, example="mini.safetensors")
    check_not_an_input("--out", out, inputs)


def check_writable(flag: str, path: Path, *, example: str = "options.json") -> None:
    """Make sure that a file can be written.

    Args:
        flag: the flag that names it.
        path: path of the file.
        example: name of such a file, for the hint.

    Raises:
        RecipeError: it cannot.
    """
    folder = path.parent
    if not folder.is_dir():
        raise RecipeError(f"{flag} {path}: the folder {folder} does not exist.", hint=f"mkdir -p {folder}")
    if path.is_dir():
        raise RecipeError(f"{flag} {path} is a folder.", hint=f"Name a file, like {example}.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(f"{flag} {path}: the folder {folder} cannot be written to: {error.strerror}.") from error


def check_checkpoint(model: ModelRecipe) -> None:
    """Make sure that the file with the model's weights exists.

    Raises:
        CheckpointError: it does not.
    """
    path = model.checkpoint
    if path is not None and not path.exists():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"--checkpoint {path} does not exist{nearest(path.name, beside)}.")


def check_recipe(value: object, kind: type, example: str) -> None:
    """Make sure that a caller from Python gives a recipe, not the name of a model.

    Raises:
        RecipeError: the value is of another type.
    """
    if not isinstance(value, kind):
        hint = f"For example {example}, all from vitcompress.recipe: docs/reference.md."
        raise RecipeError(f"{value!r}: expected {kind.__name__}, got {type(value).__name__}.", hint=hint)


def files_read(recipe: Recipe) -> dict[str, Path | None]:
    """Return the files that a recipe reads models from, by their flags."""
    teacher = recipe.teacher
    return {
        "--checkpoint": recipe.model.checkpoint,
        "--options": recipe.target.options,
        "--teacher": Path(teacher.teacher) if teacher.teacher else None,
        "--teacher-checkpoint": teacher.teacher_checkpoint,
    }


def checkpoints_beside(out: Path, recipe: RunRecipe) -> Checkpoints | None:
    """Return where the state of the training is kept, beside `out`; None where it is not.

    Raises:
        VitcompressError: the folder holds something else.
    """
    checkpoints = Checkpoints.for_output(out, save_interval(recipe.save_every))
    if checkpoints:
        checkpoints.check()
    return checkpoints


def check_run(recipe: Recipe, *, trains: bool = True, starts: bool = False) -> None:
    """Make sure that this machine can run a recipe, and its processes can divide a batch.

    Args:
        recipe: what to do.
        trains: the run trains.
        starts: the command is about to start processes; otherwise the existing ones run.

    Raises:
        RecipeError: it cannot; every fault at once.
    """
    run, faults = recipe.run, []
    if run.device == "cuda" and not torch.cuda.is_available():
        faults.append(("--device cuda: no CUDA device found.", "Use --device auto."))
    on_gpu = device_of(run) == "cuda"
    if run.precision == "tf32" and not (on_gpu and torch.cuda.get_device_capability()[0] >= 8):
        faults.append(("--precision tf32 needs an Ampere or newer GPU.", "Use fp32 or bf16."))
    if run.resume and run.save_every == "none":
        faults.append(
            ("--resume needs saved states, but --save-every none saves none.", "Remove one of the two flags.")
        )
    if run.log_with is not None and missing_packages(run.log_with):  # accelerate would skip it silently
        faults.append((f"--log-with {run.log_with}: it is not installed.", install_hint(run.log_with)))
    if on_gpu and run.num_processes is not None and run.num_processes > torch.cuda.device_count():
        message = f"--num-processes {run.num_processes}: this machine has {torch.cuda.device_count()} GPUs."
        faults.append((message, "Leave it out for one process per GPU."))
    if trains:
        faults += _indivisible(recipe, num_processes(run) if starts else num_launched())
    raise_faults(RecipeError, faults)


def _indivisible(recipe: Recipe, processes: int) -> list[tuple[str, str]]:
    """Return the fault of a batch that processes and parts cannot divide."""
    accumulate, batch = recipe.distill.accumulate, recipe.data.step_images
    pair = 2 if recipe.data.mixup or recipe.data.cutmix else 1  # mixing takes images in pairs
    divisor = processes * accumulate * pair
    if batch % divisor == 0:
        return []
    into = " x ".join(f"{n} {what}" for n, what in ((processes, "processes"), (accumulate, "parts")) if n > 1)
    even = ", each even for --mixup and --cutmix" if pair == 2 else ""
    nearest_batch = max(1, round(batch / divisor)) * divisor
    return [(f"--batch-size {batch} cannot be divided into {into or 'pairs'}{even}.", f"Try {nearest_batch}.")]


def bundle_of(model: str, classes: tuple[str, ...] = ()) -> Bundle | None:
    """Return the built-in images of a model; None where it has none.

    Args:
        model: name of the model.
        classes: names of its classes; empty where they are unchanged. Other classes have no
            built-in images.
    """
    unchanged = not classes or classes == FASHION_VIT.pretrained_cfg["label_names"]
    return FASHION_VIT if model == FASHION_VIT.name and unchanged else None
