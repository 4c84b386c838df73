"""Check what targets and gates ask of a model: a search for a plan, and points of top-1."""

from __future__ import annotations

import dataclasses

from torch import nn

from vitcompress.data.sets import ImageSet
from vitcompress.distill.teacher import Teacher
from vitcompress.errors import RecipeError, VitcompressError, raise_faults
from vitcompress.families.outputs import CLASSES, FEATURES, OutputKind, outputs_of
from vitcompress.recipe import GateRecipe, PlanRecipe, Recipe, StartRecipe, TargetRecipe, flag_of
from vitcompress.search.saved import read_options

_TARGETS = ("target_ratio", "target_size", "target_drop")


def no_top1(flag: str, name: str, kind: OutputKind) -> tuple[str, str]:
    """Return the fault of a flag that counts points of top-1, for outputs that have none.

    Args:
        flag: the flag.
        name: name of the model.
        kind: kind of its outputs.
    """
    message = f"{flag} counts points of top-1, but the outputs of {name} are {kind.noun}."
    return message, f"Remove {flag}; the report compares the outputs with the teacher's."


def unmeasured_drop(
    gates: GateRecipe, name: str, kind: OutputKind, val: ImageSet | None, teacher: Teacher | None
) -> list[tuple[str, str]]:
    """Return why a fine-tuned file's drop cannot be measured, if a gate asks for it.

    Args:
        gates: gates that the result must meet.
        name: name of the file.
        kind: kind of the result's outputs.
        val: validation images.
        teacher: the model to compare with.
    """
    if gates.max_drop is None:
        return []
    if kind is not CLASSES:
        return [no_top1("--max-drop", name, kind)]
    if val is None or val.labels is None or teacher is None:
        return [("--max-drop needs labeled images and a teacher.", "Give --val-data and --teacher.")]
    return []


def check_target(recipe: Recipe, model: nn.Module, *, measures: bool = False) -> None:
    """Make sure that a recipe with a target gives no plan, and that options can be measured.

    Args:
        recipe: what to do.
        model: the source, on any device, the meta device included.
        measures: options are only measured.

    Raises:
        RecipeError: every fault at once.
    """
    target = next((flag_of(name) for name in _TARGETS if getattr(recipe.target, name) is not None), None)
    kind = outputs_of(model)
    if target is None and not measures:
        free = TargetRecipe()
        for field in dataclasses.fields(TargetRecipe):
            if getattr(recipe.target, field.name) != getattr(free, field.name):
                raise RecipeError(
                    f"{flag_of(field.name)} needs a target.",
                    hint="Give --target-ratio, --target-size or --target-drop.",
                )
        return
    faults = []
    if recipe.target.options is not None:
        try:
            read_options(recipe.target.options)
        except VitcompressError as error:
            faults.append((str(error), error.hint))
    if target == "--target-drop" and kind not in (CLASSES, FEATURES):
        faults.append(no_top1(target, recipe.model.model, kind))
    if kind.nats is None:
        faults.append((f"{target or '--calibrate'} needs a model with classes: the cost of an option is measured on "
                       "its predictions.", "Give --share, --width or --adapter-rank."))  # fmt: skip
    if target is not None:
        faults += _plan_faults(recipe, target)
    raise_faults(RecipeError, faults)


def _plan_faults(recipe: Recipe, target: str) -> list[tuple[str, str]]:
    """Return what a recipe asks of the plan that the search for a target decides."""
    free = PlanRecipe(transforms=recipe.plan.transforms, token_kernel=recipe.plan.token_kernel)
    given = [f.name for f in dataclasses.fields(PlanRecipe) if getattr(recipe.plan, f.name) != getattr(free, f.name)]
    faults = [
        (f"{flag_of(name)} and {target} cannot be used together.",
         f"Remove {flag_of(name)}: with {target}, the search decides the plan.")
        for name in given
    ]  # fmt: skip
    if recipe.start.start != StartRecipe().start:
        faults.append((f"--start {recipe.start.start} and {target} cannot be used together.",
                       f"Remove --start: with {target}, starts are fitted to images."))  # fmt: skip
    if "rpe" in (recipe.plan.transforms or ()) and "narrow" in recipe.target.kinds:
        others = ",".join(kind for kind in recipe.target.kinds if kind != "narrow") or "share"
        faults.append(("--transforms rpe does not work with narrow heads: its table needs the channels of a full head.",
                       f"Remove rpe from --transforms, or give --kinds {others}."))  # fmt: skip
    return faults
