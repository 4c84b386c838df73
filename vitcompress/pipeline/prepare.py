"""Resolve a compression's recipe into a checked `Run`, before any weight is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitcompress.data.classes import known_classes
from vitcompress.data.open import open_sets
from vitcompress.data.views import Views
from vitcompress.distill.matching import ComparedModel, Matching, match_models
from vitcompress.distill.student import check_student
from vitcompress.distill.teacher import Teacher, find_teacher
from vitcompress.errors import Faults, RecipeError
from vitcompress.families.find import family_named
from vitcompress.initialize.start import needs_images
from vitcompress.measure.macs import with_macs
from vitcompress.pipeline.checks import (
    bundle_of,
    check_cache,
    check_checkpoint,
    check_measurable,
    check_out,
    check_run,
    check_states,
    check_store,
    check_target,
    files_read,
    unfit_images,
    with_images,
)
from vitcompress.pipeline.run import Run
from vitcompress.plans.make import make_plan
from vitcompress.plans.model import Plan
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import data_config
from vitcompress.pretrained.resolve import Source, resolve
from vitcompress.recipe import PlanRecipe, Recipe
from vitcompress.report.gates import unreachable_gates
from vitcompress.runtime.processes import alone, join
from vitcompress.surgery import apply_plan


@dataclass(frozen=True)
class Resolved:
    """What a recipe's names stand for, without weights and images; None where there is a fault.

    Attributes:
        source: the model that is compressed.
        model: the same, built without weights.
        plan: the student's plan; where a plan is searched for, one that shares nothing.
        config: timm's data config.
        teacher: another model to learn from; None where none is named.
        matching: the losses, and where student and teacher are read.
    """

    source: Source | None
    model: nn.Module | None
    plan: Plan | None
    config: dict[str, Any] | None
    teacher: Teacher | None
    matching: Matching | None


def prepare(
    recipe: Recipe, out: Path | None, command: str, *, measures: bool = False, joins: bool = True
) -> Run:  # fmt: skip
    """Check a recipe and resolve what it names, before any weight is loaded.

    Args:
        recipe: what to do.
        out: path of the artifact; None where nothing is written.
        command: the command as typed.
        measures: options are measured on images, and nothing is trained.
        joins: join the other processes; else only check.

    Raises:
        VitcompressError: all faults that can be seen without weights, at once.
    """
    faults = Faults()
    if out is not None:
        faults.attempt(check_out, out, files_read(recipe))
        faults.attempt(check_states, out, recipe.run)
    faults.attempt(check_run, recipe, trains=not measures, starts=not joins)
    faults.attempt(check_checkpoint, recipe.model)
    resolved = resolve_recipe(recipe, faults, measures=measures)
    source, model, plan = resolved.source, resolved.model, resolved.plan
    searches = measures or recipe.target.is_given
    if measures and model is not None:
        faults.attempt(check_measurable, model)
    if plan and not searches:
        faults.extend(unreachable_gates(plan.size, recipe.gates))
    train = val = None
    if source is not None and model is not None:
        recipe = with_images(recipe, fitted=searches or bool(plan and needs_images(plan, recipe.start.start)))
        num_classes: Any = getattr(model, "num_classes", 0)  # a model of no family may have none
        sets = faults.attempt(
            open_sets, recipe.data, bundle=bundle_of(source.name), num_classes=num_classes,
            seed=recipe.run.seed, classes=known_classes((), source.pretrained_cfg, num_classes),
            flag="--calibrate" if measures else "--data",
        )  # fmt: skip
        train, val = sets or (None, None)
        if sets is not None:
            faults.extend(unfit_images(recipe, train, val))
        if resolved.config and train is not None:
            faults.attempt(Views, train, resolved.config, training=True, recipe=recipe.data, seed=0)
    faults.raise_as(RecipeError)
    matching = resolved.matching
    assert source
    assert plan
    assert resolved.config is not None
    assert matching
    notes = (train.note,) if train is not None and train.note else ()
    run = Run(
        recipe if recipe.target.is_given else with_losses(recipe, matching.losses),
        out or Path(),
        command,
        source,
        plan,
        resolved.config,
        train,
        val,
        resolved.teacher,
        (resolved.teacher or source).name,
        matching,
        join(recipe.run, (out or Path()).parent) if joins else alone(),
        classes=tuple(source.pretrained_cfg.get("label_names", ())) or (train.classes if train else ()),
        notes=notes,
    )
    if run.teacher is None or run.num_steps == 0:
        return run
    compared = f"The student learned from {run.teacher.name}; it is compared with {source.name} all the same."
    return replace(run, notes=(*notes, compared))


def resolve_recipe(recipe: Recipe, faults: Faults, *, measures: bool = False) -> Resolved:
    """Resolve model, plan, teacher and losses; mistakes go to `faults`."""
    source = faults.attempt(resolve, recipe.model)
    model = faults.attempt(empty_model, source) if source else None
    faults.attempt(check_store, recipe.store, recipe.distill)
    teacher = faults.attempt(find_teacher, recipe.teacher) if recipe.teacher.teacher else None
    if source is None or model is None:
        return Resolved(source, model, None, None, teacher, None)
    faults.attempt(check_target, recipe, model, measures=measures)
    # Where a plan is searched for, one that shares nothing stands in for it until there are
    # weights.
    free = PlanRecipe(share=1, transforms=recipe.plan.transforms or (), token_kernel=recipe.plan.token_kernel)
    plan_recipe = free if recipe.target.is_given else recipe.plan
    plan = faults.attempt(make_plan, model, plan_recipe, name=recipe.model.model, store=recipe.store.kind)
    config = faults.attempt(data_config, model, recipe.model)
    matching = None
    if plan and config:
        plan = with_macs(plan, model, config["input_size"])
        blocks = family_named(plan.family).block_names(model)
        faults.attempt(check_student, model, blocks, recipe.distill, name=recipe.model.model)
        if teacher or not recipe.teacher.teacher:
            matching = faults.attempt(compared, source, model, plan, teacher, recipe, config)
        if matching is not None:
            faults.attempt(check_cache, recipe, matching.losses)
    return Resolved(source, model, plan, config, teacher, matching)


def compared(
    source: Source, model: nn.Module, plan: Plan, teacher: Teacher | None, recipe: Recipe, config: dict[str, Any]
) -> Matching:
    """Match the losses to student and teacher.

    Args:
        source: the model that is compressed.
        model: the same, built without weights; not changed.
        plan: the student's plan.
        teacher: another teacher; None for the source.
        recipe: losses and layers.
        config: timm's data config.

    Raises:
        RecipeError: a loss does not fit the two models.
    """
    built = copy.deepcopy(model)
    apply_plan(built, plan)
    student, original = (ComparedModel(source.name, each, config["input_size"]) for each in (built, model))
    return match_models(student, teacher.compared_model if teacher else original, recipe.distill)


def with_losses(recipe: Recipe, losses: Mapping[str, float]) -> Recipe:
    """Return the recipe with the losses that its defaults come to."""
    return replace(recipe, distill=replace(recipe.distill, loss=dict(losses)))
