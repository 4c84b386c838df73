"""Resolve a compression's recipe into a checked `Run`, before any weight is loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitcompress.artifact.source import find_source, model_file
from vitcompress.data.classes import ModelClasses, known_classes, label_names
from vitcompress.data.open import open_sets
from vitcompress.data.preprocessing import describe_preprocessing
from vitcompress.data.views import Views
from vitcompress.distill.matching import ComparedModel, Matching, match_models
from vitcompress.distill.student import check_student
from vitcompress.distill.teacher import Teacher, find_teacher
from vitcompress.errors import Faults, RecipeError
from vitcompress.families.outputs import REGRESSION, count_classes, has_classes, outputs_of, told_outputs
from vitcompress.families.registry import family_named
from vitcompress.measure.macs import with_macs
from vitcompress.pipeline.checks import (
    bundle_of,
    check_checkpoint,
    check_out,
    check_run,
    check_store,
    checkpoints_beside,
    files_read,
    unfit_images,
    with_images,
)
from vitcompress.pipeline.labels import classes_of, tell_images
from vitcompress.pipeline.run import Run
from vitcompress.pipeline.targets import check_target, no_top1
from vitcompress.plans.make import make_plan
from vitcompress.plans.model import Plan
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import data_config, preprocessing_notes
from vitcompress.pretrained.resolve import Source
from vitcompress.recipe import CPU_BATCH_SIZE, DEFAULT_BATCH_SIZE, PlanRecipe, Recipe
from vitcompress.report.gates import unreachable_gates
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.precision import device_of
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
        notes: what a user should know about the preprocessing.
    """

    source: Source | None
    model: nn.Module | None
    plan: Plan | None
    config: dict[str, Any] | None
    teacher: Teacher | None
    matching: Matching | None
    notes: tuple[str, ...] = ()

    @property
    def preprocessing(self) -> str:
        """How images become the model's input, in one line; empty where that is not known."""
        return "" if self.config is None else describe_preprocessing(self.config)


def prepare(
    recipe: Recipe, out: Path | None, command: str, reporter: Reporter, *, measures: bool = False, joins: bool = True
) -> Run:  # fmt: skip
    """Check a recipe and resolve what it names, before any weight is loaded.

    Args:
        recipe: what to do.
        out: path of the artifact; None where nothing is written.
        command: the command as typed.
        reporter: shows the progress.
        measures: options are measured on images, and nothing is trained.
        joins: join the other processes; else only check.

    Raises:
        VitcompressError: all faults that can be seen without weights, at once.
    """
    faults, recipe = Faults(), with_batch_size(recipe)
    checkpoints = None
    if out is not None:
        faults.attempt(check_out, out, {"MODEL": model_file(recipe.model), **files_read(recipe)})
        checkpoints = faults.attempt(checkpoints_beside, out, recipe.run)
    faults.attempt(check_run, recipe, trains=not measures, starts=not joins)
    resolved = resolve_recipe(recipe, faults, measures=measures)
    source, model = resolved.source, resolved.model
    train = val = None
    if source is not None and model is not None:
        recipe = with_images(recipe, None if measures or recipe.target.is_given else resolved.plan)
        num_classes = count_classes(model)
        classes = ModelClasses(num_classes, known_classes((), source.pretrained_cfg, num_classes))
        sets = faults.attempt(
            open_sets, recipe.data, bundle=bundle_of(source.name), model=classes, seed=recipe.run.seed,
            flag="--calibrate" if measures else "--data",
        )  # fmt: skip
        train, val = sets or (None, None)
        if sets is not None:
            faults.extend(unfit_images(recipe, train, val, has_classes=has_classes(model)))
        if resolved.config and train is not None:
            faults.attempt(Views, train, resolved.config, training=True, recipe=recipe.data, seed=0)
    faults.raise_as(RecipeError)
    plan, config, teacher, matching = resolved.plan, resolved.config, resolved.teacher, resolved.matching
    assert source is not None  # otherwise there was a fault; likewise for the others
    assert plan is not None
    assert config is not None
    assert matching is not None
    assert model is not None
    notes = [*resolved.notes, *outputs_notes(model, source.name)]
    for note in (f"preprocessing: {resolved.preprocessing}", *notes):
        reporter.say(note)
    notes += tell_images(reporter, train, val)
    if teacher is not None and recipe.distill.steps != 0:
        notes.append(
            f"The student learned from {teacher.name}, but the report compares it with its source {source.name}."
        )
    out = out or Path()
    return Run(
        recipe=recipe if recipe.target.is_given else with_training(recipe, loss=dict(matching.losses)),
        out=out,
        command=command,
        source=source,
        plan=plan,
        config=config,
        train=train,
        val=val,
        teacher=teacher,
        teacher_name=(teacher or source).name,
        matching=matching,
        accelerator=join(recipe.run, out.parent) if joins else alone(),
        reporter=reporter,
        checkpoints=checkpoints,
        classes=label_names(source.pretrained_cfg) or classes_of(train, val),
        notes=tuple(notes),
    )


def outputs_notes(model: nn.Module, name: str) -> list[str]:
    """Return what to say of the kind of a model's outputs; nothing where it is the usual one.

    Args:
        model: any model.
        name: name of the model.
    """
    kind = outputs_of(model)
    if has_classes(model) or kind.nats is None:
        return []
    if kind is REGRESSION and told_outputs(model) is None:
        return [f"{name} has a single output, taken for a number (regression); --outputs multi_label makes it a label."]
    return [f"The outputs of {name} are {kind.noun}; labels of images are left out."]


def resolve_recipe(recipe: Recipe, faults: Faults, *, measures: bool = False) -> Resolved:
    """Resolve model, plan, teacher and losses; mistakes go to `faults`."""
    faults.attempt(check_checkpoint, recipe.model)
    source = faults.attempt(find_source, recipe.model)
    model = faults.attempt(empty_model, source) if source else None
    faults.attempt(check_store, recipe.store, recipe.distill)
    teacher = None
    if recipe.teacher.teacher:
        teacher = faults.attempt(find_teacher, recipe.teacher, outputs=recipe.model.outputs)
    if source is None or model is None:
        return Resolved(source, model, None, None, teacher, None)
    faults.attempt(check_target, recipe, model, measures=measures)
    if recipe.gates.max_drop is not None and not has_classes(model):
        faults.extend([no_top1("--max-drop", recipe.model.model, outputs_of(model))])
    # a plan that shares nothing stands in for one that is searched for on weights
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
            matching = faults.attempt(match_losses, source, model, plan, teacher, recipe, config)
    if plan and not (measures or recipe.target.is_given):
        faults.extend(unreachable_gates(plan.size, recipe.gates))
    return Resolved(source, model, plan, config, teacher, matching, preprocessing_notes(source, model, recipe.model))


def match_losses(
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
    built = (planned(model, plan), model)
    student, original = (ComparedModel(source.name, empty, config["input_size"]) for empty in built)
    return match_models(student, teacher.compared_model if teacher else original, recipe.distill)


def planned(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of a model whose blocks share what a plan says."""
    student = copy.deepcopy(model)
    apply_plan(student, plan)
    return student


def with_batch_size(recipe: Recipe) -> Recipe:
    """Return the recipe with a number of images per step, where none is given.

    A CPU is not faster with more at a time, and a student learns more from more steps.
    """
    suited = CPU_BATCH_SIZE if device_of(recipe.run) == "cpu" else DEFAULT_BATCH_SIZE
    return replace(recipe, data=replace(recipe.data, batch_size=recipe.data.batch_size or suited))


def with_training(recipe: Recipe, **settings: Any) -> Recipe:
    """Return the recipe with some settings of its training changed, named as in `DistillRecipe`."""
    return replace(recipe, distill=replace(recipe.distill, **settings))
