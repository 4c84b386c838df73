"""What do a recipe's names stand for?  Its model, plan and teacher, and what of them is compared; weights unread."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vitcompress.distill.matching import ComparedModel, Matching, match_models
from vitcompress.distill.student import check_student
from vitcompress.distill.teacher import Teacher, find_teacher
from vitcompress.families.find import family_named
from vitcompress.measure.macs import with_macs
from vitcompress.pipeline.checks import check_cache, check_store, check_target
from vitcompress.plans.make import make_plan
from vitcompress.plans.model import Plan
from vitcompress.pretrained.inputs import data_config
from vitcompress.pretrained.source import Source, empty_model, resolve
from vitcompress.recipe import PlanRecipe, Recipe
from vitcompress.surgery import apply_plan


@dataclass(frozen=True)
class Settled:
    """What a recipe's names stand for, without weights and images; None where there is a fault."""

    source: Any
    model: Any
    plan: Any
    config: Any
    teacher: Any
    comparison: Any


def settle(recipe: Recipe, attempt: Any, *, measures: bool = False) -> Settled:
    """Find model, plan and teacher, and what of them is compared, each step by `attempt`."""
    source = attempt(resolve, recipe.model)
    model = attempt(empty_model, source) if source else None
    attempt(check_store, recipe.store, recipe.distill)
    teacher = attempt(find_teacher, recipe.teacher) if recipe.teacher.teacher else None
    found: Any = None
    config: Any = None
    comparison = None
    if model is not None:
        attempt(check_target, recipe, model, measures=measures)
        # where a plan is searched for, one that shares nothing stands in for it till there are weights
        free = PlanRecipe(share=1, transforms=recipe.plan.transforms or (), token_kernel=recipe.plan.token_kernel)
        asked = free if recipe.target.is_given else recipe.plan
        found = attempt(make_plan, model, asked, name=recipe.model.model, store=recipe.store.kind)
        config = attempt(data_config, model, recipe.model)
    if model is not None and found and config:
        found = with_macs(found, model, config["input_size"])
        blocks = family_named(found.family).block_names(model)
        attempt(check_student, model, blocks, recipe.distill, name=recipe.model.model)
        if teacher or not recipe.teacher.teacher:
            comparison = attempt(compared, source, model, found, teacher, recipe, config)
            if comparison is not None:
                attempt(check_cache, recipe, comparison.losses)
    return Settled(source, model, found, config, teacher, comparison)


def compared(
    source: Source, model: nn.Module, plan: Plan, teacher: Teacher | None, recipe: Recipe, config: dict[str, Any]
) -> Matching:
    """What of student and teacher is compared; the student as its plan makes it of the empty `model`."""
    built = copy.deepcopy(model)
    apply_plan(built, plan)
    student, own = (ComparedModel(source.name, each, config["input_size"]) for each in (built, model))
    return match_models(student, teacher.compared_model if teacher else own, recipe.distill)


def with_losses(recipe: Recipe, losses: Mapping[str, float]) -> Recipe:
    """The recipe with the losses that its defaults came to."""
    return replace(recipe, distill=replace(recipe.distill, loss=dict(losses)))
