"""Compress a model: check, load, plan, start, distill, store, measure, write.

Recipe → Plan → student → TrainLog → Report → artifact
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from pydantic import TypeAdapter
from torch import Tensor, nn

from vitcompress.artifact.digest import sha256_of
from vitcompress.data.augmentation import training_transform
from vitcompress.data.open import check_places
from vitcompress.distill.log import TrainLog
from vitcompress.distill.teacher import load_adapted
from vitcompress.errors import Faults, RecipeError
from vitcompress.pipeline.checks import check_recipe
from vitcompress.pipeline.finish import Reference, conclude
from vitcompress.pipeline.labels import check_teacher, with_labels
from vitcompress.pipeline.measured import Place
from vitcompress.pipeline.plan import load_source, search_plan, with_plan
from vitcompress.pipeline.prepare import outputs_notes, prepare, resolve_recipe, with_training
from vitcompress.pipeline.run import Run
from vitcompress.pipeline.start import make_student, with_lr, with_start_images
from vitcompress.pipeline.train import train
from vitcompress.plans.model import Plan
from vitcompress.recipe import Recipe
from vitcompress.report.events import tell_plan
from vitcompress.report.model import Report
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.stopwatch import Stopwatch


def compress(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    reporter: Reporter | None = None,
    command: str = "",
    started: float | None = None,
) -> Report:
    """Compress a model and write a verified file with its report.

    Writes `out`, and beside it `<stem>.report.json`, `<stem>.report.md` and, where two models have
    a top-1, its picture `<stem>.report.svg`; each replaces an older file only when it is complete.
    During training, its state is kept in `<stem>.checkpoints`. Where several processes were
    launched, each calls this function; the main one writes.

    Args:
        recipe: what to do.
        out: path of the artifact; its folder exists.
        reporter: shows the progress; silent by default.
        command: the command as typed, for the report.
        started: when the command started, in seconds since 1970, for `max_minutes`; now by default.

    Returns:
        The report.

    Raises:
        VitcompressError: a fault of the recipe, raised before any weight is loaded; nothing is
            written then.
    """
    clock = Stopwatch(started)
    reporter = reporter or Reporter(quiet=True)
    check_recipe(recipe, Recipe, 'Recipe(ModelRecipe("deit_tiny"))')

    # check
    run = replace(prepare(recipe, Path(out), command, reporter), clock=clock)
    set_seed(recipe.run.seed, device_specific=True)

    # load
    told: list[str] = []
    source = load_source(run, told)
    run = replace(run, notes=(*run.notes, *told))
    run = with_labels(run, source, stops=recipe.distill.steps != 0)
    source_sha256 = sha256_of(source.state_dict())

    # plan: searched for, or as an interrupted run settled it
    checkpoints = run.checkpoints
    digests = {"model.sha256": source_sha256, **({"teacher.sha256": run.teacher.sha256()} if run.teacher else {})}
    facts = run.facts(**digests)
    settled = checkpoints.read_settled(facts, resume=recipe.run.resume, say=reporter.say) if checkpoints else None
    if settled is not None:
        run = _resumed(run, settled)
    has_state = settled is not None and checkpoints is not None and checkpoints.newest() is not None
    starts = not has_state or recipe.distill.fade > 0  # what fades is the difference from the start
    place = Place.of(checkpoints)
    run = with_start_images(run, source, place if recipe.run.resume else None, starts=starts, settles=settled is None)
    clock.lap("loading")
    weights: Mapping[str, Tensor] | None = None
    if settled is None and recipe.target.is_given:
        run, weights = search_plan(run, source, place)
        clock.lap("search")
    size = run.plan.size
    reporter.say(f"{run.source.name}: {size.teacher_params:,} → {size.student_params:,} parameters")

    # start
    student, turned = make_student(run, source, starts=starts, weights=weights)
    del weights
    if settled is None:
        run = with_lr(run, student, source)
        if checkpoints and recipe.distill.steps != 0 and run.accelerator.is_main_process:
            checkpoints.begin(facts, _settled(run), eager=recipe.target.is_given)
    if turned is not source:
        source.cpu()  # until it is evaluated: `turned` takes its place
    tell_plan(reporter, run.source.name, run.plan)
    clock.lap("start")

    # distill
    learn = partial(_distill, run, student, source, turned)

    # store, measure, write
    return conclude(run, student, Reference(source, source_sha256), learn)


def _resumed(run: Run, settled: Mapping[str, Any]) -> Run:
    """Return the run with the choices of the interrupted run: plan, store and learning rate."""
    run = with_plan(run, TypeAdapter(Plan).validate_python(settled["plan"]), settled["store"])
    return replace(run, recipe=with_training(run.recipe, lr=settled["lr"]))


def _settled(run: Run) -> dict[str, Any]:
    """Return the choices that a resumed run reuses."""
    plan = TypeAdapter(Plan).dump_python(run.plan, mode="json")
    return {"plan": plan, "store": run.recipe.store.store, "lr": run.recipe.distill.lr}


def _distill(run: Run, student: nn.Module, source: nn.Module, turned: nn.Module) -> TrainLog:
    """Train the student, in place, to do what the teacher does.

    Args:
        run: the request.
        student: the student at its start.
        source: the model to compress.
        turned: the source in the student's order; the teacher, if no other is named.
    """
    fade = run.recipe.distill.fade
    teacher = turned
    if run.teacher:
        teacher = load_adapted(run.teacher, run.config, run.matching, run.reporter.say)
        check_teacher(run, teacher, stops=run.num_steps != 0)
    if fade and run.num_steps != 0 and any(len(group.blocks) > 1 for group in run.plan.groups):
        run.reporter.say(
            f"During the first {100 * fade:.0f} % of training, each block's own matrices fade out, "
            "so the loss rises. Afterwards it falls."
        )
    return train(run, student, teacher, reference=turned)


def dry_run(recipe: Recipe) -> tuple[Plan | None, tuple[str, ...]]:
    """Check what can be checked of a recipe without weights, images and the machine that runs it.

    Args:
        recipe: what would be done.

    Returns:
        The plan, None where it is searched for on weights and images; and notes on the
        preprocessing, the outputs and the distillation.

    Raises:
        VitcompressError: all faults at once.
    """
    faults = Faults()
    resolved = resolve_recipe(recipe, faults)
    faults.attempt(check_places, recipe.data)
    if resolved.config:
        faults.attempt(training_transform, resolved.config, recipe.data)
    faults.raise_as(RecipeError)
    assert resolved.source is not None  # otherwise there was a fault; likewise for the others
    assert resolved.model is not None
    assert resolved.matching is not None
    told = outputs_notes(resolved.model, resolved.source.name)
    notes = (f"preprocessing: {resolved.preprocessing}", *resolved.notes, *told, *resolved.matching.notes)
    return None if recipe.target.is_given else resolved.plan, notes


def check(recipe: Recipe, out: Path) -> None:
    """Raise every fault of a request to `compress`, without joining other processes.

    Raises:
        VitcompressError: all faults at once.
    """
    prepare(recipe, out, "", Reporter(quiet=True), joins=False)
