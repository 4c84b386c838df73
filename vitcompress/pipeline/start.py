"""The student's start: its images, its weights, and the learning rate that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitcompress.distill.lessons import BATCH_IMAGES
from vitcompress.distill.optimizers import lr_for_start
from vitcompress.distill.refine import Refinement, groups_to_refine, refine_student
from vitcompress.families.outputs import outputs_of
from vitcompress.initialize.align import align_model
from vitcompress.initialize.start import needs_images, start_student
from vitcompress.pipeline.budget import images_in, search_images, seconds_left
from vitcompress.pipeline.calibration import with_calibration
from vitcompress.pipeline.measured import Place, images_kept
from vitcompress.pipeline.prepare import planned, with_training
from vitcompress.pipeline.run import Run
from vitcompress.recipe.student import DEFAULT_REFINE, MAX_REFINE_IMAGES
from vitcompress.runtime.memory import free_bytes
from vitcompress.runtime.processes import from_main
from vitcompress.search.divergence import divergence_and_chance, shown_nats

_REFINE_SHARE = 0.5
"""Largest share of the minutes left in which blocks are trained."""

_REFINE_PASSES = 2
"""Forward passes of each image that training blocks takes, beside the steps: the two models'."""

_REFINE_BYTES = 8 * 2**30
"""Largest memory for their states; of no more than half of what is free."""


def with_start_images(run: Run, source: nn.Module, place: Place | None, *, starts: bool, settles: bool) -> Run:
    """Return the run with calibration images, where something is fitted to or measured on them.

    Args:
        run: the request.
        source: the model to compress.
        place: where an interrupted search has kept what it measured; None where it has not.
        starts: the student gets its starting weights.
        settles: plan and learning rate are not known yet.
    """
    searches, count = settles and run.recipe.target.is_given, None
    if searches and _limits_images(run):
        count = from_main(images_kept(place), run.accelerator) or search_images(run, source)
    fits = searches or (starts and needs_images(run.plan, run.recipe.start.start))
    return with_calibration(run, source, count, fits=fits, judges=searches or (settles and _wants_lr(run, source)))


def _limits_images(run: Run) -> bool:
    """Whether the number of images that a search measures on follows from its minutes."""
    recipe = run.recipe
    free = recipe.start.calibration_images is None and recipe.target.options is None
    return free and recipe.distill.max_minutes is not None


def make_student(
    run: Run, source: nn.Module, *, starts: bool = True, weights: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, nn.Module]:
    """Build the student, and set its starting weights.

    Args:
        run: the request.
        source: the model to compress; not changed.
        starts: set its starting weights; otherwise the training continues from a state.
        weights: the starting weights, where the search has built them; None to compute them.

    Returns:
        The student, and a copy of the source that computes the same, with its heads and neurons in
        the student's order.
    """
    turned = align_model(source, run.plan)
    student = planned(turned, run.plan)
    if weights is not None:
        student.load_state_dict(weights)
    elif starts:
        start_student(student, turned, run.plan, run.calibration, run.recipe.start.start)
    if starts:
        _refine(run, student, turned)
    return student, turned


def _refine(run: Run, student: nn.Module, turned: nn.Module) -> None:
    """Train the student's blocks, in place, where that is asked for or pays."""
    how = refinement(run)
    blocks = sum(len(group.blocks) for group in groups_to_refine(run.plan, how))
    if blocks == 0:
        return
    if how.seconds is not None:
        count = images_in(how.seconds, run, turned, passes=_REFINE_PASSES)
        how = how._replace(images=min(how.images, max(BATCH_IMAGES, count)))
    with run.reporter.counting(f"training {blocks} blocks") as tell:
        refine_student(student, turned, run.plan, run.unjudged(how.images), how, tell)


def refinement(run: Run) -> Refinement:
    """Return how blocks are trained: for no more steps than the whole student is, unless told."""
    recipe = run.recipe
    steps, seconds = recipe.start.refine, None
    if steps is None and run.num_steps is None:
        steps, seconds = DEFAULT_REFINE, _REFINE_SHARE / 2 * seconds_left(run)  # the other half is for passes
    elif steps is None:
        steps = min(DEFAULT_REFINE, (run.num_steps or 0) * recipe.data.step_images // BATCH_IMAGES)
    images = recipe.start.calibration_images or MAX_REFINE_IMAGES
    return Refinement(
        steps, recipe.run.seed, min(images, steps * BATCH_IMAGES),
        min(_REFINE_BYTES, free_bytes(run.accelerator.device) / 2), seconds,
        shared=not recipe.distill.fade,  # else the student begins as the source, whatever they share
    )  # fmt: skip


def with_lr(run: Run, student: nn.Module, source: nn.Module) -> Run:
    """Return the run with a learning rate that fits its start, where none was given."""
    if not _wants_lr(run, source):
        return run
    images = torch.cat(list(run.judged()))
    nats, chance = divergence_and_chance(student.eval(), source, images)
    width = int(source.num_features)  # type: ignore[arg-type]
    trained = bool(groups_to_refine(run.plan, refinement(run)))
    lr = lr_for_start(nats, chance, run.recipe.data.step_images, width, run.num_images, trained=trained)
    lr = from_main(lr, run.accelerator)
    run.reporter.say(
        f"Before training, the student's predictions differ from {run.source.name}'s by {shown_nats(nats)} of KL "
        f"divergence (random predictions: {chance:.2f}). Learning rate: {lr:.2g}."
    )
    return replace(run, recipe=with_training(run.recipe, lr=lr))


def _wants_lr(run: Run, source: nn.Module) -> bool:
    """Whether the learning rate follows from how far the start is from the source."""
    recipe = run.recipe.distill
    return recipe.lr is None and recipe.steps != 0 and outputs_of(source).nats is not None
