"""What happens in which order?  The only place where stages meet.

Recipe → Plan → student → TrainLog → Report → artifact
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from timm.models import split_model_name_tag
from torch import nn

from vitcompress.artifact import file as artifact
from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.hub import locate
from vitcompress.data import ImageSet, check_places, open_to_evaluate
from vitcompress.data.classes import known_classes
from vitcompress.data.views import random_views
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.distill.matching import Candidate, compare
from vitcompress.distill.teacher import find_teacher
from vitcompress.errors import CheckpointError, DataError, Faults, RecipeError, VitcompressError
from vitcompress.families.find import family_of
from vitcompress.families.outputs import has_classes
from vitcompress.measure.accuracy import Evaluator, Watch
from vitcompress.measure.macs import with_macs
from vitcompress.measure.results import Accuracy
from vitcompress.pipeline.checks import bundle_of, check_checkpoint, check_kind_of
from vitcompress.pipeline.produce import carry_out, load_adapted
from vitcompress.pipeline.run import Job, prepare_job
from vitcompress.pipeline.settle import settle
from vitcompress.plans.make import make_plan
from vitcompress.plans.model import Plan
from vitcompress.pretrained.inputs import data_config
from vitcompress.pretrained.source import Source, empty_model, load_teacher, resolve
from vitcompress.quantize.codecs import num_bytes
from vitcompress.recipe import (
    BUILT_IN,
    DataRecipe,
    DistillRecipe,
    ModelRecipe,
    PlanRecipe,
    Recipe,
    RunRecipe,
    TeacherRecipe,
    save_interval,
)
from vitcompress.report.events import tell_plan
from vitcompress.report.gates import unreachable_gates
from vitcompress.report.model import Report, to_json
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.processes import join

_MOST_TIMES_SMALLER = 64  # that a file may be than its source, beside
_MOST_BYTES = 4 << 30  # that any source may have


def plan(model: ModelRecipe, recipe: PlanRecipe, store: str = "source") -> Plan:
    """Decide what would be shared; loads no weights.

    Args:
        model: the teacher.
        recipe: what to share.
        store: how the file would hold the student.
    """
    check_kind_of(model, ModelRecipe, 'ModelRecipe("deit_tiny")')
    check_checkpoint(model)
    empty = empty_model(resolve(model))
    found = make_plan(empty, recipe, name=model.model, store=store)
    return with_macs(found, empty, data_config(empty, model)["input_size"])


def search(recipe: Recipe, *, reporter: Reporter | None = None) -> Plan:
    """Find the best plan for a recipe's target; loads the teacher's weights and measures on training images.

    Args:
        recipe: model, target, images and device.
        reporter: told how it goes; silent by default.

    Raises:
        VitcompressError: the recipe has faults, or the target is out of reach.
    """
    job, teacher, reporter = _measuring(recipe, reporter)
    return job.planned(teacher, reporter).plan


def sensitivities(recipe: Recipe, *, reporter: Reporter | None = None) -> list[dict[str, Any]]:
    """What each way of making each part of the model smaller would cost, measured one by one.

    Args:
        recipe: model, kinds of options, images and device.
        reporter: told how it goes; silent by default.

    Returns:
        A row per option: `kind`, `blocks`, `part`, `dial` (its width or rank; 0 where it has none), `saved_params` and
        `cost`, nats of KL per image.
    """
    job, teacher, reporter = _measuring(recipe, reporter)
    return [option.row() for option in job.planning(teacher, reporter).measure().rows()]


def _measuring(recipe: Recipe, reporter: Reporter | None) -> tuple[Job, nn.Module, Reporter]:
    """What options are measured with: the job, its teacher and who is told of it."""
    reporter = reporter or Reporter(quiet=True)
    job = prepare_job(recipe, None, "", measures=True)
    for note in job.image_notes:
        reporter.say(note)
    reporter.say(f"loading {job.source.name}")
    return job, load_teacher(job.source).to(job.accelerator.device), reporter


def family_name(model: ModelRecipe) -> str:
    """The family of a model, by name; loads no weights.

    Raises:
        VitcompressError: there is no such model, or none that can be compressed.
    """
    return family_of(empty_model(resolve(model)), model.model).name


def dry_run(recipe: Recipe) -> tuple[Plan | None, tuple[str, ...]]:
    """Check all of a recipe that can be told without reading weights and images, and without what would run it.

    Args:
        recipe: what would be done.

    Returns:
        What would be shared, None where that is searched for once there are weights and images; and what the user
        should know of the distillation.

    Raises:
        VitcompressError: every fault at once.
    """
    faults = Faults()
    attempt = faults.attempt
    settled = settle(recipe, attempt)
    attempt(check_checkpoint, recipe.model)
    attempt(check_places, recipe.data)
    if settled.plan and not recipe.target.is_given:
        faults.extend(unreachable_gates(settled.plan.size, recipe.gates))
    if settled.config:
        attempt(random_views, settled.config, recipe.data)
    faults.raise_as(RecipeError)
    return None if recipe.target.is_given else settled.plan, settled.comparison.notes


def check(recipe: Recipe, out: Path) -> None:
    """Find every fault that `compress` would, before any weight is loaded, and join no other process.

    Raises:
        VitcompressError: there are some.
    """
    prepare_job(recipe, out, "", joins=False)


def compress(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    reporter: Reporter | None = None,
    command: str = "",
    started: float | None = None,
) -> Report:
    """Compress a model: plan, surgery, start, distillation, evaluation, a verified file and its report.

    Writes `out`, and beside it `<stem>.report.json`, `<stem>.report.md` and, where two models have a top-1, its picture
    `<stem>.report.svg`; each replaces an older one only when whole. While it trains it keeps its state in
    `<stem>.checkpoints`. Where several processes were launched, each of them calls this; the main one writes.

    Args:
        recipe: what to do.
        out: the artifact's path; its folder exists.
        reporter: told what is going on; silent by default.
        command: what was typed, for the report.
        started: when, in seconds since 1970, for `max_minutes`; now by default.

    Raises:
        VitcompressError: before any weight is loaded where the recipe shows it; nothing is written then.
    """
    started = time.time() if started is None else started
    reporter = reporter or Reporter(quiet=True)
    check_kind_of(recipe, Recipe, 'Recipe(ModelRecipe("deit_tiny"))')
    job = prepare_job(recipe, Path(out), command)
    for note in job.image_notes:
        reporter.say(note)
    set_seed(recipe.run.seed, device_specific=True)
    reporter.say(f"loading {job.source.name}")  # from a hub it can take a while
    with job.accelerator.local_main_process_first():  # one of them fetches, the others find what it fetched
        teacher = load_teacher(job.source).to(job.accelerator.device)
    checkpoints = Checkpoints.of(job.out, save_interval(recipe.run.save_every))
    job, student, source = job.begun(teacher, checkpoints, reporter)
    if source is not teacher:
        teacher.cpu()  # until it is measured: the source does the same in its place
    tell_plan(reporter, job.source.name, job.plan)
    return carry_out(
        lambda: job.distill(student, source, teacher, checkpoints, started, reporter),
        lambda log, out: job.finish(student, teacher, log, out, reporter),
        job.out, job.recipe, checkpoints=checkpoints, accelerator=job.accelerator, reporter=reporter,
    )  # fmt: skip


def evaluate(
    path: str | os.PathLike[str],
    recipe: DataRecipe,
    *,
    teacher: ModelRecipe | None = None,
    checkpoint: Path | None = None,
    reporter: Reporter | None = None,
    watch: Watch | None = None,
) -> Accuracy:
    """Measure an artifact on images, next to its teacher where that can be had.

    Args:
        path: the artifact, as `load` takes it.
        recipe: `data` names the images; of a folder with train/ and val/ in it, val/ is taken.
        teacher: compare with this model, or file of ours, instead of the artifact's source.
        checkpoint: weights of the source; no path is ever taken from the artifact itself.
        reporter: told why there is no teacher.
        watch: told of each batch: images, logits of student and teacher, labels.
    """
    reporter = reporter or Reporter(quiet=True)
    path = locate(path)
    manifest = artifact.read_manifest(path)
    student = artifact.load(path)
    images = _images_to_evaluate(recipe, manifest, student.num_classes)  # type: ignore[arg-type]
    reference = _reference(path, manifest, student, teacher, checkpoint, reporter)
    device = join(RunRecipe()).device
    with reporter.counting("evaluating", brief=True) as tell:
        evaluator = Evaluator(images, manifest.data_config, recipe)
        accuracy = evaluator(student.to(device), reference.to(device) if reference else None, tell, watch)
    assert accuracy is not None  # there are images
    reporter.tell("evaluate", accuracy=to_json(accuracy))
    return accuracy


def _reference(
    path: Path, manifest: artifact.Manifest, student: nn.Module, teacher: ModelRecipe | None, checkpoint: Path | None,
    reporter: Reporter,
) -> nn.Module | None:  # fmt: skip
    """What an artifact is compared with, taking its views; None where nothing is named and its source is not to be had.

    Raises:
        VitcompressError: what is named is not there, or cannot be compared.
    """
    name = str(manifest.source["name"])
    if teacher is not None:
        reporter.say(f"loading {teacher.model}")
        return _named(path, manifest, teacher)
    try:
        if checkpoint is None and not manifest.source_sha256:
            raise CheckpointError("the file was fine-tuned: its source has another head or another image size.")
        if checkpoint is None and ":" in name:
            raise CheckpointError("the file names a place to fetch its teacher from, which is not trusted.")
        reporter.say(f"loading {name}")
        source = resolve(ModelRecipe(name, checkpoint, dict(manifest.source["model_args"])))
        check_source(source, manifest, file_bytes=path.stat().st_size)
        reference = load_teacher(source)
        if sha256_of(reference.state_dict()) != manifest.source_sha256:
            raise CheckpointError("these are other weights than the artifact was made from.")
    except VitcompressError as error:
        if checkpoint is not None or not has_classes(student):
            raise  # features can only be compared
        reporter.say(f"Without the teacher: {error} {error.hint}")
        return None
    return reference


def _named(path: Path, manifest: artifact.Manifest, teacher: ModelRecipe) -> nn.Module:
    """The model that --teacher names, whatever it is to those who compress: timm's or a file of ours."""
    asked = TeacherRecipe(teacher.model, teacher.checkpoint, teacher.model_arg)
    found = find_teacher(asked, checkpoint_flag="--checkpoint")
    empty = artifact.empty_student(path, manifest)
    losses = {"logits" if has_classes(empty) else "features": 1.0}
    own = Candidate(path.name, empty, manifest.data_config["input_size"])
    config = dict(manifest.data_config)
    return load_adapted(found, config, compare(own, found.candidate, DistillRecipe(loss=losses)))


def check_source(source: Source, manifest: artifact.Manifest, *, file_bytes: int) -> None:
    """Make sure that what a file says of its source can be so, before there is memory for the source's weights.

    Raises:
        CheckpointError: it is another model than the file's, or far too large a one.
    """
    told, found = (split_model_name_tag(each)[0] for each in (manifest.source["architecture"], source.architecture))
    if told != found:
        raise CheckpointError(f"the file holds a {told}, and its source is said to be a {found}.")
    size = num_bytes(empty_model(source).state_dict())
    if size > _MOST_TIMES_SMALLER * file_bytes + _MOST_BYTES:
        raise CheckpointError(f"its source is said to have {size:,} bytes, and the file has {file_bytes:,}.")


def _images_to_evaluate(recipe: DataRecipe, manifest: artifact.Manifest, num_classes: int) -> ImageSet:
    classes = known_classes(manifest.classes, manifest.source["pretrained_cfg"], num_classes)
    bundle = bundle_of(str(manifest.source["name"]), manifest.classes)
    spec = recipe.data or (BUILT_IN if bundle else None)
    if spec is None:
        raise DataError("There are no images to evaluate on.", hint="Give --data DIR.")
    return open_to_evaluate(spec, "--data", recipe, bundle, num_classes, classes)
