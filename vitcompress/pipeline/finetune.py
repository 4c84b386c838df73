"""Fine-tune a model: other classes or another image size; what its blocks share stays shared.

artifact or timm model → new head and size → TrainLog → Report → artifact
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.source import model_file
from vitcompress.data.classes import ModelClasses, known_classes
from vitcompress.data.preprocessing import describe_preprocessing
from vitcompress.data.views import Views
from vitcompress.distill.losses import LOSSES, needs_teacher
from vitcompress.distill.matching import ComparedModel, Matching
from vitcompress.distill.optimizers import lr_for_finetuning
from vitcompress.distill.student import check_student
from vitcompress.distill.teacher import adapt_inputs, find_teacher
from vitcompress.errors import CheckpointError, Faults, RecipeError, VitcompressError
from vitcompress.families.outputs import CLASSES, count_classes, has_classes, outputs_of
from vitcompress.families.registry import family_named
from vitcompress.measure.macs import with_macs
from vitcompress.pipeline.adapt import adapt_student, adapted_source
from vitcompress.pipeline.checks import (
    check_out,
    check_recipe,
    check_run,
    check_store,
    checkpoints_beside,
    endless_epochs,
    files_read,
)
from vitcompress.pipeline.finish import Reference, conclude, measure
from vitcompress.pipeline.labels import check_teacher, tell_images, with_labels
from vitcompress.pipeline.origin import Origin, check_unsettled, find_origin
from vitcompress.pipeline.prepare import planned, with_batch_size, with_training
from vitcompress.pipeline.run import Run
from vitcompress.pipeline.targets import unmeasured_drop
from vitcompress.pipeline.task import images_to_learn, new_head, settle_losses
from vitcompress.pipeline.train import train
from vitcompress.plans.make import with_sizes_on
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.resolve import Source
from vitcompress.recipe import Recipe
from vitcompress.report.events import tell_plan
from vitcompress.report.gates import unreachable_gates
from vitcompress.report.model import Parent, Report
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.processes import alone, join
from vitcompress.runtime.stopwatch import Stopwatch


def finetune(
    model: str | os.PathLike[str],
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    img_size: int | None = None,
    reporter: Reporter | None = None,
    command: str = "",
    started: float | None = None,
) -> Report:
    """Train a model on other classes or at another image size; what its blocks share stays shared.

    The model gets a new head, unless the images are of its own classes or have no labels. It
    learns from labels, and from a teacher: the one that is named, or an artifact's source where the
    classes are the same.

    Args:
        model: a file that `compress` or `finetune` wrote, or the model of timm that `recipe.model`
            names.
        recipe: images, teacher and training.
        out: path of the new artifact; its folder exists.
        img_size: rows and columns of an image, in pixels; None to keep the size.
        reporter: shows the progress; silent by default.
        command: the command as typed, for the report.
        started: when the command started, in seconds since 1970, for `max_minutes`; now by default.

    Returns:
        The report.

    Raises:
        VitcompressError: a fault, raised before any weight is loaded where it can be; nothing is
            written then.
    """
    clock = Stopwatch(started)
    reporter = reporter or Reporter(quiet=True)
    check_recipe(recipe, Recipe, 'Recipe(ModelRecipe("mini"), data=DataRecipe("images"))')

    # check
    request = _prepare(model, recipe, Path(out), img_size, command, reporter)
    run, num_classes, origin = request.run, request.num_classes, request.origin
    if run.train and run.train.labels is not None:
        reporter.say(
            f"new head for {num_classes} classes"
            if num_classes
            else f"{run.train.name}: the model's own classes, so its head is kept"
        )
    reporter.say(f"preprocessing: {describe_preprocessing(run.config)}")
    if recipe.distill.steps != 0:
        reporter.say(f"learning rate: {run.recipe.distill.peak_lr:.2g}")
    set_seed(recipe.run.seed, device_specific=True)

    # load
    with run.accelerator.local_main_process_first():
        run, teacher = _with_teacher(request)
        student = origin.load(reporter.say)
    run = replace(run, lineage=origin.lineage(student), clock=clock)
    source_sha256 = request.source_sha256(run.lineage[-1])
    adapt_student(student, run.plan, num_classes=num_classes, img_size=img_size)
    if num_classes is None:
        run = with_labels(run, student.to(run.accelerator.device).eval(), stops=False)
    tell_plan(reporter, run.source.name, run.plan)
    checkpoints = run.checkpoints
    if checkpoints and recipe.distill.steps != 0:
        digests = {"teacher.sha256": sha256_of(teacher.state_dict())} if teacher is not None else {}
        facts = run.facts(**{"file.sha256": run.lineage[-1].sha256}, **digests)
        settled = checkpoints.read_settled(facts, resume=recipe.run.resume, say=reporter.say)
        if settled is None and run.accelerator.is_main_process:
            checkpoints.begin(facts, {}, eager=False)
    before = measure(run, student, None) if num_classes is None else None
    clock.lap("loading")

    # learn
    learn = partial(train, run, student, teacher, reference=teacher)

    # store, measure, write
    return conclude(run, student, Reference(teacher, source_sha256, before), learn)


def check(model: str, recipe: Recipe, out: Path, *, img_size: int | None = None) -> None:
    """Raise every fault of a request to `finetune`, without joining other processes.

    Raises:
        VitcompressError: all faults at once.
    """
    _prepare(model, recipe, out, img_size, "", Reporter(quiet=True), joins=False)


@dataclass(frozen=True)
class _Request:
    """A checked request to fine-tune.

    Attributes:
        run: the run.
        origin: what is fine-tuned.
        num_classes: K of the new head; None where the head is kept.
    """

    run: Run
    origin: Origin
    num_classes: int | None

    def source_sha256(self, parent: Parent) -> str:
        """Return the digest of the source's weights; empty where the head or image size changes.

        Args:
            parent: what is fine-tuned; of a model of timm, with the digest of its tensors.
        """
        manifest = self.origin.manifest
        if self.num_classes is not None or self.run.source.model_args != manifest.source["model_args"]:
            return ""
        return manifest.source_sha256 if self.origin.path is not None else parent.sha256


def _with_teacher(request: _Request) -> tuple[Run, nn.Module | None]:
    """Load the teacher; where it was not named and cannot be loaded, continue with labels alone.

    Raises:
        VitcompressError: the teacher cannot be loaded, and the losses need it.
    """
    run, source = request.run, request.run.teacher
    is_named = run.recipe.teacher.teacher is not None
    if source is None:
        return run, None
    try:
        teacher = source.load(run.reporter.say)
        if not is_named and sha256_of(teacher.state_dict()) != request.origin.manifest.source_sha256:
            file = request.origin.name
            raise CheckpointError(f"the weights of {source.name} are not those that {file} was made from.")
    except VitcompressError as error:
        rest = {name: weight for name, weight in run.matching.losses.items() if not LOSSES[name].teacher}
        if is_named or not rest:
            raise
        note = f"Training continues without the teacher {source.name}: {error}"
        run.reporter.say(note)
        run = replace(
            run, recipe=with_training(run.recipe, loss=rest), matching=Matching(rest), teacher=None, teacher_name=None,
            notes=(*run.notes, note),
        )  # fmt: skip
        return run, None
    adapt_inputs(teacher, source.config, run.config, run.matching.image_size)
    if is_named:
        check_teacher(run, teacher, stops=False)
    return run, teacher


def _prepare(
    model: str | os.PathLike[str], recipe: Recipe, out: Path, img_size: int | None, command: str, reporter: Reporter,
    *, joins: bool = True,
) -> _Request:  # fmt: skip
    """Check a request and resolve what it names, before any weight is loaded.

    Raises:
        VitcompressError: all faults that can be seen without weights, at once.
    """
    faults = Faults()
    attempt = faults.attempt
    recipe = with_batch_size(replace(recipe, model=replace(recipe.model, model=os.fspath(model))))
    file = model_file(recipe.model)
    attempt(check_out, out, {os.fspath(model): file, **files_read(recipe)})
    checkpoints = attempt(checkpoints_beside, out, recipe.run)
    attempt(check_run, recipe, starts=not joins)
    attempt(check_unsettled, recipe)
    origin = attempt(find_origin, recipe.model)
    teacher = attempt(find_teacher, recipe.teacher) if recipe.teacher.teacher else None
    if origin is None:
        faults.raise_as(RecipeError)
    assert origin is not None  # otherwise there was a fault
    name, parent = origin.name, origin.manifest
    recipe = replace(recipe, model=replace(recipe.model, model=name if origin.path else recipe.model.model))
    if recipe.store.kind == "source":  # an artifact is its own source
        recipe = replace(recipe, store=replace(recipe.store, store=parent.store))  # type: ignore[arg-type]
    attempt(check_store, recipe.store, recipe.distill)
    old = Source(**parent.source)
    old_model: Any = empty_model(old)
    known = known_classes(parent.classes, old.pretrained_cfg, old_model.num_classes)
    old_classes = ModelClasses(count_classes(old_model), known if has_classes(old_model) else ())
    sets = attempt(images_to_learn, recipe.data, parent, old_classes, seed=recipe.run.seed)
    images, val = sets or (None, None)
    faults.extend(endless_epochs(recipe, images))
    classes, num_classes = new_head(images, known, has_classes=has_classes(old_model))
    if recipe.teacher.teacher is None and num_classes is None:
        teacher = origin.teacher()
    kind = CLASSES if num_classes else outputs_of(old_model)
    faults.extend(unmeasured_drop(recipe.gates, name, kind, val, teacher))
    if num_classes and recipe.distill.steps == 0:
        faults.add(
            f"--steps 0: the new head of {num_classes} classes would stay random.", "Give --steps greater than 0."
        )
    source = attempt(adapted_source, old, num_classes=num_classes, img_size=img_size)
    config = dict(parent.data_config)
    if img_size:
        config["input_size"] = (config["input_size"][0], img_size, img_size)
    matching = None
    if source is not None and images is not None and (teacher or not recipe.teacher.teacher):
        empty = empty_model(source)
        student = ComparedModel(name, planned(empty, parent.plan), config["input_size"])
        attempt(Views, images, config, training=True, recipe=recipe.data, seed=0)
        matching = attempt(settle_losses, student, teacher, recipe.distill, images, classes)
        if matching is not None:
            width: Any = student.model.num_features
            lr = recipe.distill.lr or lr_for_finetuning(recipe.data.step_images, width)
            recipe = with_training(recipe, loss=dict(matching.losses), lr=lr)
            blocks = family_named(parent.plan.family).block_names(student.model)
            attempt(check_student, student.model, blocks, recipe.distill, name=name)
    faults.raise_as(RecipeError)
    assert source is not None
    assert matching is not None
    plan = with_macs(with_sizes_on(parent.plan, empty, recipe.store.kind), empty, config["input_size"])
    hint = "finetune cannot change the sharing. Lower the gate, or use --store int8 or int4."
    faults.extend((message, hint) for message, _ in unreachable_gates(plan.size, recipe.gates))
    faults.raise_as(RecipeError)
    taught = teacher is not None and needs_teacher(matching.losses)
    notes = tell_images(reporter, images, val)
    if origin.path is not None:
        notes.append("Sizes and latencies of the teacher are those of the same model without sharing.")
    if num_classes:
        notes.append(f"The head is new, for {num_classes} classes, so there is no accuracy from before.")
    run = Run(
        recipe, out, command, source, plan, config, images, val, teacher,
        teacher.name if teacher and taught else None, matching,
        join(recipe.run, out.parent) if joins else alone(), reporter, checkpoints,
        classes=classes, notes=tuple(notes),
    )  # fmt: skip
    return _Request(run, origin, num_classes)
