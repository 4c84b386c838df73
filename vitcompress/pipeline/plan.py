"""Plan a student: directly from a recipe, or by a search on the teacher's weights and images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.artifact.source import find_source, load_weights
from vitcompress.data.preprocessing import describe_preprocessing
from vitcompress.distill.log import MAX_POINTS
from vitcompress.families.outputs import OutputKind, outputs_of
from vitcompress.families.registry import family_of
from vitcompress.measure.accuracy import Evaluator
from vitcompress.measure.macs import with_macs
from vitcompress.pipeline.calibration import with_calibration
from vitcompress.pipeline.checks import check_checkpoint, check_recipe
from vitcompress.pipeline.labels import with_labels
from vitcompress.pipeline.measured import Place, check_save, measured_options
from vitcompress.pipeline.prepare import match_losses, planned, prepare, with_training
from vitcompress.pipeline.run import Run
from vitcompress.plans.make import make_plan, with_sizes_on
from vitcompress.plans.model import Plan
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import data_config, preprocessing_notes
from vitcompress.quantize.store import stored_tensors
from vitcompress.recipe import ModelRecipe, PlanRecipe, Recipe
from vitcompress.report.model import to_json
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.memory import free_bytes
from vitcompress.runtime.processes import from_main
from vitcompress.runtime.shares import part_of
from vitcompress.search.frontier import FrontierPoint, trace_frontier
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.model import Search
from vitcompress.search.target import search_target

_MEASURING_SHARE = 0.8  # of the time of a frontier
JUDGED_IMAGES = 1000  # training images that `--target-drop` is measured on

# Sizes in a file's header, of JSON as it is written.
_TENSOR_ENTRY_BYTES = 100  # type, shape and offsets of a tensor, beside its name
_FIXED_BYTES = 14_000  # recipe, report and versions, of the longest commands and notes
_POINT_BYTES, _LOSS_BYTES = 80, 32  # a point of the loss curve, and a loss in it


def plan(model: ModelRecipe, recipe: PlanRecipe, store: str = "source") -> Plan:
    """Decide which blocks share what; loads no weights.

    Args:
        model: the model to compress.
        recipe: what to share.
        store: how the file holds the student.
    """
    check_recipe(model, ModelRecipe, 'ModelRecipe("deit_tiny")')
    check_checkpoint(model)
    empty = empty_model(find_source(model))
    student_plan = make_plan(empty, recipe, name=model.model, store=store)
    return with_macs(student_plan, empty, data_config(empty, model)["input_size"])


def preprocessing(model: ModelRecipe) -> tuple[str, tuple[str, ...]]:
    """Return how images become a model's input, in one line, and notes on it; loads no weights."""
    source = find_source(model)
    empty = empty_model(source)
    return describe_preprocessing(data_config(empty, model)), preprocessing_notes(source, empty, model)


def outputs_kind(model: ModelRecipe) -> OutputKind:
    """Return the kind of a model's outputs; loads no weights.

    Raises:
        VitcompressError: there is no such model, or it cannot have the outputs that are told.
    """
    return outputs_of(empty_model(find_source(model)))


def family_name(model: ModelRecipe) -> str:
    """Return the name of a model's family; loads no weights.

    Raises:
        VitcompressError: there is no such model, or it cannot be compressed.
    """
    return family_of(empty_model(find_source(model)), model.model).name


def search(recipe: Recipe, *, reporter: Reporter | None = None, save: Path | None = None) -> Plan:
    """Find the best plan for a recipe's target; loads weights and measures on training images.

    Args:
        recipe: model, target, images and device.
        reporter: shows the progress; silent by default.
        save: file for the measured options; None for none.

    Raises:
        VitcompressError: the recipe has faults, or the target is out of reach.
    """
    run, _ = search_plan(*_measuring(recipe, reporter, save), Place.beside(save))
    return run.plan


def sensitivities(
    recipe: Recipe, *, reporter: Reporter | None = None, save: Path | None = None
) -> list[dict[str, Any]]:
    """Measure the cost of each option: each way of making a part of the model smaller.

    Args:
        recipe: model, kinds of options, images and device.
        reporter: shows the progress; silent by default.
        save: file for the measured options; None for none.

    Returns:
        A row per option: `kind`, `scale` (the part and what is set in it), `blocks`, `dial` (its
        width or rank; 0 where it has none), `saved_params` and `nats`, KL per image in a student of
        about half the widths, as the kind of the outputs defines it.
    """
    run, source = _measuring(recipe, reporter, save)
    with _searching(run, source) as (searching, tell):
        measured = measured_options(run, searching, recipe.target.kinds, tell, Place.beside(save))
        return [option.row() for option in measured.at(math.inf)]


def frontier(recipe: Recipe, *, reporter: Reporter | None = None, save: Path | None = None) -> list[FrontierPoint]:
    """List the best plans for many budgets, with their predicted costs; builds none of them.

    Args:
        recipe: model, kinds of options, images, store and device.
        reporter: shows the progress; silent by default.
        save: file for the measured options; None for none.

    Raises:
        VitcompressError: the recipe has faults.
    """
    run, source = _measuring(recipe, reporter, save)
    empty, store = empty_model(run.source), run.recipe.store.kind

    def sized(student_plan: Plan) -> Plan:
        return with_macs(with_sizes_on(student_plan, empty, store), empty, run.config["input_size"])

    with _searching(run, source) as (searching, tell):
        measuring, tracing = part_of(tell, 0.0, _MEASURING_SHARE), part_of(tell, _MEASURING_SHARE, 1.0)
        measured = measured_options(run, searching, recipe.target.kinds, measuring, Place.beside(save))
        return trace_frontier(measured, sized, tracing)


def _measuring(recipe: Recipe, reporter: Reporter | None, save: Path | None) -> tuple[Run, nn.Module]:
    """Check a recipe and the file for its options, and load its model, to measure options on."""
    if save is not None:
        check_save(recipe, save)
    run = prepare(recipe, None, "", reporter or Reporter(quiet=True), measures=True)
    source = load_source(run)
    return with_calibration(with_labels(run, source, stops=False), source), source


def load_source(run: Run, told: list[str] | None = None) -> nn.Module:
    """Load the model that is compressed, onto the device.

    Args:
        run: the run; says what is done with the weights.
        told: receives the same sentences, for the report.
    """

    def tell(text: str) -> None:
        run.reporter.say(text)
        if told is not None:
            told.append(text)

    run.reporter.say(f"loading {run.source.name}")  # from a hub it can take a while
    with run.accelerator.local_main_process_first():  # one process fetches, the others find the file
        return load_weights(run.source, tell).to(run.accelerator.device)


def search_plan(run: Run, source: nn.Module, place: Place | None) -> tuple[Run, dict[str, Tensor]]:
    """Find the best plan for the run's target; the main process searches.

    Args:
        run: a run whose recipe has a target.
        source: the model to compress, in eval mode on the device.
        place: where the measured options are kept; None keeps nothing.

    Returns:
        The run with the plan, and the starting weights of its student.

    Raises:
        PlanError: the target is out of reach; the message says what is in reach.
    """
    choice: tuple[Plan | None, str, dict[str, Tensor]] = None, "", {}
    if run.accelerator.is_main_process:
        with ExitStack() as stack, _searching(run, source) as (searching, tell):

            def measure(kinds: Sequence[str], tell: Callable[[float], None]) -> MeasuredOptions:
                measured = measured_options(run, searching, kinds, tell, place)
                if place is not None and run.recipe.target.options is None:
                    stack.enter_context(place.naming())
                return measured

            best = search_target(run.recipe.target, searching, tell, measure)
        start = {name: t.cpu() for name, t in best.student.state_dict().items()}  # not all on the main process's GPU
        choice = replace(best.plan, why=best.reasons()), best.store, start
    chosen, store, start = from_main(choice, run.accelerator)
    assert chosen is not None  # the main process searched
    for line in chosen.why:
        run.reporter.say(line)
    return with_plan(run, with_macs(chosen, empty_model(run.source), run.config["input_size"]), store), start


def with_plan(run: Run, student_plan: Plan, store: str) -> Run:
    """Return the run with a plan that was searched for, and the store that the plan counts on."""
    matching = match_losses(run.source, empty_model(run.source), student_plan, run.teacher, run.recipe, run.config)
    recipe = with_training(run.recipe, loss=dict(matching.losses))
    recipe = replace(recipe, store=replace(recipe.store, store=store))  # type: ignore[arg-type]
    return replace(run, recipe=recipe, plan=student_plan, matching=matching)


@contextmanager
def _searching(run: Run, source: nn.Module) -> Iterator[tuple[Search, Callable[[float], None]]]:
    """Yield the search for a plan, with the calibration images loaded, and its progress."""
    recipe = run.recipe
    with run.reporter.counting("searching") as tell:
        yield (
            Search(
                teacher=source,
                name=run.source.name,
                fitted=torch.cat(list(run.calibration())),
                judged=torch.cat(list(run.judged())),
                store=recipe.store.store,
                token_kernel=recipe.plan.token_kernel,
                transforms=recipe.plan.transforms or (),
                multiple=recipe.target.width_multiple,
                memory_bytes=recipe.target.max_memory or free_bytes(run.accelerator.device) / 2,
                header_bytes=partial(header_bound, run, empty_model(run.source)),
                drop=partial(_drop, run, source),
                say=run.reporter.say,
            ),
            tell,
        )


def _drop(run: Run, source: nn.Module, student: nn.Module) -> float:
    """Return the points of top-1 that a student loses on images that it was not fitted to.

    Without labels: the percentage of images on which its prediction differs from the source's, an
    upper bound of the loss.
    """
    assert run.train is not None  # `prepare` made sure
    images = run.drawing.others(run.train, JUDGED_IMAGES)
    accuracy = Evaluator(images, run.config, run.recipe.data)(student, source)
    assert accuracy is not None  # there are images
    if accuracy.top1_drop is not None:
        return accuracy.top1_drop
    assert accuracy.agreement is not None  # there is a teacher, and it has classes
    return 100 - accuracy.agreement


def header_bound(run: Run, empty: nn.Module, student_plan: Plan, store: str) -> int:
    """Return an upper bound of the bytes that a file takes beside its tensors.

    Args:
        run: the run; its training and its classes count.
        empty: the model to compress, without weights; not changed.
        student_plan: the student's plan.
        store: how the file holds the student.
    """
    names = stored_tensors(planned(empty, student_plan), store)
    entries = sum(len(name) + _TENSOR_ENTRY_BYTES for name in names)
    plans = 2 * len(json.dumps(to_json(student_plan)))  # in the manifest, and its groups in the report
    classes = 2 * len(json.dumps(run.classes))  # in the manifest and in timm's config
    points = min(MAX_POINTS if run.num_steps is None else run.num_steps, MAX_POINTS)
    losses = 1 + len(run.matching.losses)
    return _FIXED_BYTES + entries + plans + classes + points * (_POINT_BYTES + losses * _LOSS_BYTES)
