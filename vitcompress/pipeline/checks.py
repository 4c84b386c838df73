"""What can be told before any weight is loaded?  Faults that several commands look for."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from vitcompress.artifact.paths import SUFFIX, check_apart
from vitcompress.bundled import FASHION_VIT, Bundle
from vitcompress.data.sets import NO_LENGTH_HINT, ImageSet
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.distill.losses import LOSSES
from vitcompress.errors import CheckpointError, RecipeError, nearest, raise_faults
from vitcompress.recipe import (
    BUILT_IN,
    KINDS,
    STORES_IN_LOOP,
    DistillRecipe,
    ModelRecipe,
    PlanRecipe,
    Recipe,
    RunRecipe,
    StoreRecipe,
    flag_of,
    save_interval,
)
from vitcompress.runtime.launch import num_launched, num_processes

_TARGETS = ("target_ratio", "target_size", "target_drop")


def with_images(recipe: Recipe, *, fitted: bool) -> Recipe:
    """The recipe with the built-in images named, where it needs images and names none, and counts no passes over them.

    Args:
        recipe: what is asked for.
        fitted: the start, or the search for a plan, wants images.
    """
    needed = fitted or recipe.distill.steps != 0
    if recipe.data.data is not None or not needed or recipe.distill.epochs is not None:
        return recipe
    return replace(recipe, data=replace(recipe.data, data=BUILT_IN))


def unfit_images(recipe: Recipe, train: ImageSet | None, val: ImageSet | None) -> list[tuple[str, str]]:
    """What the recipe wants of its images and they have not, as `(message, hint)` pairs.

    Args:
        recipe: what is asked for.
        train: training images.
        val: validation images.
    """
    faults = []
    if train is None and recipe.distill.epochs is not None:
        hint = "Give --data DIR; or --steps, for crops of built-in photographs."
        faults.append((f"--epochs {recipe.distill.epochs:g}: there are no images to pass over.", hint))
    if (recipe.distill.loss or {}).get("labels") and train is not None and train.labels is None:
        faults.append(("--loss labels needs labelled images.", "Give --data DIR with class folders."))
    if recipe.gates.max_drop is not None and (val is None or val.labels is None):
        faults.append(("--max-drop needs labelled images.", "Give --val-data DIR with class folders."))
    return faults + endless_epochs(recipe, train)


def endless_epochs(recipe: Recipe, train: ImageSet | None) -> list[tuple[str, str]]:
    """A length in passes over images that have no end, as a `(message, hint)` pair."""
    if recipe.distill.epochs is None or train is None or not train.endless:
        return []
    return [(f"--epochs {recipe.distill.epochs:g}: {train.name} cannot be counted.", NO_LENGTH_HINT)]


def check_store(recipe: StoreRecipe, distill: DistillRecipe) -> None:
    """Make sure that there is something to train with, where the training shall know how weights are stored.

    Raises:
        RecipeError: there is not.
    """
    if recipe.qat_fraction and recipe.kind not in STORES_IN_LOOP:
        raise RecipeError(
            f"--qat-fraction {recipe.qat_fraction:g}: --store {recipe.kind} quantises nothing.",
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
    if out.suffix != SUFFIX and not out.is_dir():
        hint = f"--out {out.with_suffix(SUFFIX)}; vitcompress export makes other formats of it."
        raise RecipeError(f"--out {out}: what is written is a {SUFFIX} file.", hint=hint)
    if out.is_dir():
        raise RecipeError(f"--out {out} is a folder.", hint="Name a file, like mini.safetensors.")
    check_apart("--out", out, inputs)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(f"--out {out}: the folder {folder} cannot be written to: {error.strerror}.") from error


def check_checkpoint(model: ModelRecipe) -> None:
    """Make sure that the file with the model's weights is there.

    Raises:
        CheckpointError: it is not.
    """
    path = model.checkpoint
    if path is not None and not path.exists():
        beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"--checkpoint {path} does not exist{nearest(path.name, beside)}.")


def check_kind_of(asked: object, kind: type, example: str) -> None:
    """Make sure that who calls from Python gives a recipe, and no name of a model.

    Raises:
        RecipeError: it is something else.
    """
    if not isinstance(asked, kind):
        hint = f"For example {example}, all from vitcompress.recipe: docs/reference.md."
        raise RecipeError(f"{asked!r} is a {type(asked).__name__}, and no {kind.__name__}.", hint=hint)


def files_read(recipe: Recipe) -> dict[str, Path | None]:
    """The files that hold a recipe's models, by the flags that name them."""
    teacher = recipe.teacher
    return {
        "--checkpoint": recipe.model.checkpoint,
        "--teacher": Path(teacher.teacher) if teacher.teacher else None,
        "--teacher-checkpoint": teacher.teacher_checkpoint,
    }


def check_states(out: Path, recipe: RunRecipe) -> None:
    """Make sure that the state of the training can be kept beside `out`, in a folder that is for nothing else.

    Raises:
        VitcompressError: it cannot.
    """
    checkpoints = Checkpoints.of(out, save_interval(recipe.save_every))
    if checkpoints:
        checkpoints.check()


def check_run(recipe: Recipe, *, trains: bool = True, starts: bool = False) -> None:
    """Make sure that the device is there, and that each step's images can be dealt out to the processes.

    Args:
        recipe: what to do.
        trains: there are steps.
        starts: processes are about to be started for it; else those that there are do it.

    Raises:
        RecipeError: not so; every fault at once.
    """
    run, faults = recipe.run, []
    if run.device == "cuda" and not torch.cuda.is_available():
        faults.append(("--device cuda is not there.", "--device auto takes what there is."))
    on_gpu = run.device in ("auto", "cuda") and torch.cuda.is_available()
    if run.precision == "tf32" and not (on_gpu and torch.cuda.get_device_capability()[0] >= 8):
        faults.append(("--precision tf32 needs a GPU that has it (Ampere or newer).", "Use fp32 or bf16."))
    if run.resume and run.save_every == "none":
        faults.append(("--resume: --save-every none keeps no state to go on from.", "Leave one of them out."))
    if run.log_with is not None and importlib.util.find_spec(run.log_with) is None:  # accelerate would leave it out
        message = f"--log-with {run.log_with}: it is not installed."
        faults.append((message, f"pip install 'vitcompress[{run.log_with}]'"))
    if on_gpu and run.num_processes is not None and run.num_processes > torch.cuda.device_count():
        message = f"--num-processes {run.num_processes}: this machine has {torch.cuda.device_count()} GPUs."
        faults.append((message, "Leave it out for one process per GPU."))
    if trains:
        faults += _uncut(recipe, num_processes(run) if starts else num_launched())
    raise_faults(RecipeError, faults)


def _uncut(recipe: Recipe, processes: int) -> list[tuple[str, str]]:
    """A batch that cannot be cut into as many parts as it must, as a `(message, hint)` pair."""
    accumulate, batch = recipe.distill.accumulate, recipe.data.batch_size
    parts = processes * accumulate
    each = 2 if recipe.data.mixup or recipe.data.cutmix else 1  # mixing takes images in pairs
    if batch % (parts * each) == 0:
        return []
    into = " x ".join(f"{n} {what}" for n, what in ((processes, "processes"), (accumulate, "parts")) if n > 1)
    whole = max(1, round(batch / (parts * each))) * parts * each
    even = ", each even for --mixup and --cutmix" if each == 2 else ""
    return [(f"--batch-size {batch} cannot be cut into {into or 'pairs'}{even}.", f"Try {whole}.")]


def check_cache(recipe: Recipe, losses: Mapping[str, float]) -> None:
    """Make sure that what is learned from the teacher can be kept, where it shall be.

    Args:
        recipe: what is asked for.
        losses: that it comes to.

    Raises:
        RecipeError: it cannot.
    """
    if recipe.run.cache_teacher is None:
        return
    flag = f"--cache-teacher {recipe.run.cache_teacher}"
    if recipe.distill.max_minutes is not None:
        raise RecipeError(f"{flag}: how many views --max-minutes makes is not known.", hint="Give --steps or --epochs.")
    more = [name for name in losses if LOSSES[name].teacher and name != "logits"]
    if more:
        raise RecipeError(
            f"{flag} keeps logits, and the losses {', '.join(more)} look at more of the teacher.",
            hint="Give --loss logits=1.",
        )
    if not any(LOSSES[name].teacher for name in losses):
        raise RecipeError(f"{flag}: no loss looks at a teacher.", hint="Leave it out.")


def bundle_of(model: str, classes: tuple[str, ...] = ()) -> Bundle | None:
    """The built-in images of a model; None where it has none.

    Args:
        model: its name.
        classes: names of its classes; empty where they are the model's own. Others have no images built in.
    """
    own = not classes or classes == FASHION_VIT.pretrained_cfg["label_names"]
    return FASHION_VIT if model == FASHION_VIT.name and own else None


def check_target(recipe: Recipe, model: torch.nn.Module, *, measures: bool = False) -> None:
    """Make sure that a plan that is searched for is not given as well, and that there are classes to search by.

    Args:
        recipe: what was asked for.
        model: the teacher, on any device; meta will do.
        measures: options are only measured.

    Raises:
        RecipeError: every fault at once.
    """
    if not recipe.target.is_given:
        if recipe.target.kinds != KINDS and not measures:
            raise RecipeError("--kinds needs a target.", hint="Give --target-ratio, --target-size or --target-drop.")
        return
    free = PlanRecipe(transforms=recipe.plan.transforms, token_kernel=recipe.plan.token_kernel)
    given = [f.name for f in dataclasses.fields(PlanRecipe) if getattr(recipe.plan, f.name) != getattr(free, f.name)]
    target = next(flag_of(n) for n in _TARGETS if getattr(recipe.target, n) is not None)
    faults = [
        (f"{flag_of(name)} and {target} exclude each other.",
         "Leave it out: the search decides what is shared.")
        for name in given
    ]  # fmt: skip
    if not getattr(model, "num_classes", 0):
        faults.append((f"{target} needs a model with classes: options are weighed by its predictions.",
                       "Give --share, --width or --adapter-rank."))  # fmt: skip
    if "rpe" in (recipe.plan.transforms or ()) and "narrow" in recipe.target.kinds:
        others = ",".join(kind for kind in recipe.target.kinds if kind != "narrow") or "share"
        faults.append(("--transforms rpe: its table has as many channels as a head, which narrow ones have not.",
                       f"Leave it out, or give --kinds {others}."))  # fmt: skip
    raise_faults(RecipeError, faults)


def check_measurable(model: torch.nn.Module) -> None:
    """Make sure that there are classes: what an option costs is told by the predictions.

    Raises:
        RecipeError: there are none.
    """
    if not getattr(model, "num_classes", 0):
        raise RecipeError(
            "Options cannot be measured on a model without classes: they are weighed by its predictions.",
            hint="Choose among --share, --width and --adapter-rank by compressing with each.",
        )
