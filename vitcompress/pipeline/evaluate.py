"""Measure an artifact on images, next to its teacher."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from timm.models import split_model_name_tag
from torch import nn

from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.hub import locate
from vitcompress.artifact.load import empty_student, load
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.read import read_manifest
from vitcompress.artifact.source import FILE
from vitcompress.data.classes import ModelClasses, known_classes
from vitcompress.data.open import open_to_evaluate
from vitcompress.data.preprocessing import describe_preprocessing
from vitcompress.data.sets import ImageSet, renumbered
from vitcompress.distill.matching import ComparedModel, match_models
from vitcompress.distill.teacher import find_teacher, load_adapted
from vitcompress.errors import CheckpointError, DataError, VitcompressError
from vitcompress.families.outputs import count_classes, has_classes, outputs_of
from vitcompress.measure.accuracy import Evaluator, Watch
from vitcompress.measure.results import Accuracy
from vitcompress.pipeline.checks import bundle_of
from vitcompress.pipeline.labels import judge, tell_images
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.load import load_pretrained
from vitcompress.pretrained.resolve import Source, resolve
from vitcompress.quantize.codecs import num_bytes
from vitcompress.recipe import BUILT_IN, DataRecipe, DistillRecipe, ModelRecipe, RunRecipe, TeacherRecipe
from vitcompress.report.model import to_json
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.processes import join

# A file cannot make us load a source far larger than itself: at most 64 times its size, plus 4 GiB.
_MAX_TIMES_LARGER = 64
_MAX_SOURCE_BYTES = 4 << 30


@dataclass(frozen=True)
class Checkpoint:
    """Weights of an artifact's source.

    Attributes:
        path: their file; None to look for it.
        key: key of the weights in it; None to find them.
    """

    path: Path | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if self.key is not None and self.path is None:
            raise CheckpointError("--checkpoint-key needs --checkpoint.")


def evaluate(
    path: str | os.PathLike[str],
    recipe: DataRecipe,
    *,
    teacher: ModelRecipe | None = None,
    checkpoint: Checkpoint | Path | None = None,
    reporter: Reporter | None = None,
    watch: Watch | None = None,
) -> Accuracy:
    """Measure an artifact on images, next to its teacher where that can be loaded.

    Args:
        path: the artifact, as `load` takes it.
        recipe: `data` names the images; of a folder with train/ and val/, val/ is used.
        teacher: compare with this model or artifact instead of the artifact's source.
        checkpoint: weights of the source; a path in the artifact itself is never followed.
        reporter: says why there is no teacher; silent by default.
        watch: called with each batch: images, logits of student and teacher, labels.
    """
    reporter = reporter or Reporter(quiet=True)
    path = locate(path)
    manifest = read_manifest(path)
    student = load(path)
    images = _images(recipe, manifest, count_classes(student))
    tell_images(reporter, images)
    weights = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    reference = _reference(path, manifest, student, teacher, weights, reporter)
    device = join(RunRecipe()).device
    reporter.say(f"preprocessing: {describe_preprocessing(manifest.data_config)}")
    if images.numbering is not None and images.numbering.others:
        judge_by, name = (reference, "the teacher") if reference else (student, path.name)
        judged = judge(images, judge_by.to(device), manifest.data_config, recipe, name)
        reporter.say(judged.line)
        images = renumbered(images, judged.numbering)
    evaluator = Evaluator(images, manifest.data_config, recipe)
    with reporter.counting("evaluating", brief=True) as tell:
        accuracy = evaluator(student.to(device), reference.to(device) if reference else None, tell, watch)
    assert accuracy is not None  # there are images
    reporter.tell("evaluate", accuracy=to_json(accuracy))
    return accuracy


def _reference(
    path: Path, manifest: Manifest, student: nn.Module, teacher: ModelRecipe | None, weights: Checkpoint,
    reporter: Reporter,
) -> nn.Module | None:  # fmt: skip
    """Load the model to compare with; None where none is named and the source cannot be loaded.

    Raises:
        VitcompressError: the named model is missing, or cannot be compared.
    """
    name, checkpoint = str(manifest.source["name"]), weights.path
    if teacher is not None:
        reporter.say(f"loading {teacher.model}")
        return _named(path, manifest, teacher, reporter)
    try:
        if name.startswith(FILE):
            raise CheckpointError(f"{path.name} was made from {name.removeprefix(FILE)}.", hint="Give --teacher FILE.")
        if checkpoint is None and not manifest.source_sha256:
            raise CheckpointError("the file was fine-tuned: its source has another head or another image size.")
        if checkpoint is None and ":" in name:
            raise CheckpointError(
                "the file names a download location for its teacher; vitcompress does not follow it.",
                hint="Give --checkpoint FILE.",
            )
        reporter.say(f"loading {name}")
        model_args, outputs = dict(manifest.source["model_args"]), manifest.source.get("outputs")
        source = resolve(ModelRecipe(name, checkpoint, model_args, checkpoint_key=weights.key, outputs=outputs))
        check_source(source, manifest, file_bytes=path.stat().st_size)
        reference = load_pretrained(source, reporter.say)
        if sha256_of(reference.state_dict()) != manifest.source_sha256:
            raise CheckpointError(
                f"the weights of {name} are not those that {path.name} was made from.",
                hint="Give --checkpoint FILE with those weights.",
            )
    except VitcompressError as error:
        if checkpoint is not None or not has_classes(student):
            raise  # other outputs can only be compared
        reporter.say(f"The teacher is not compared: {error} {error.hint}")
        return None
    return reference


def _named(path: Path, manifest: Manifest, recipe: ModelRecipe, reporter: Reporter) -> nn.Module:
    """Load the model that --teacher names: a timm model or an artifact."""
    teacher_recipe = TeacherRecipe(
        recipe.model, recipe.checkpoint, recipe.model_arg, teacher_checkpoint_key=recipe.checkpoint_key
    )
    teacher = find_teacher(teacher_recipe, outputs=recipe.outputs, checkpoint_flag="--checkpoint")
    empty = empty_student(path, manifest)
    losses = {outputs_of(empty).loss: 1.0}
    student = ComparedModel(path.name, empty, manifest.data_config["input_size"])
    config = dict(manifest.data_config)
    matching = match_models(student, teacher.compared_model, DistillRecipe(loss=losses))
    return load_adapted(teacher, config, matching, reporter.say)


def check_source(source: Source, manifest: Manifest, *, file_bytes: int) -> None:
    """Make sure that a file's source is plausible, before memory is taken for its weights.

    Raises:
        CheckpointError: the source is another architecture than the file's, or far too large.
    """
    file_name, source_name = (
        split_model_name_tag(architecture)[0] for architecture in (manifest.source["architecture"], source.architecture)
    )
    if file_name != source_name:
        raise CheckpointError(f"the file holds a {file_name}, but its source is a {source_name}.")
    size = num_bytes(empty_model(source).state_dict())
    if size > _MAX_TIMES_LARGER * file_bytes + _MAX_SOURCE_BYTES:
        raise CheckpointError(f"its source has {size:,} bytes, too many for a file of {file_bytes:,}.")


def _images(recipe: DataRecipe, manifest: Manifest, num_classes: int) -> ImageSet:
    """Open the images to evaluate on: those that are named, or the built-in ones of the model."""
    classes = known_classes(manifest.classes, manifest.source["pretrained_cfg"], num_classes)
    bundle = bundle_of(str(manifest.source["name"]), manifest.classes)
    spec = recipe.data or (BUILT_IN if bundle else None)
    if spec is None:
        raise DataError("There are no images to evaluate on.", hint="Give --data DIR.")
    return open_to_evaluate(spec, "--data", recipe, bundle, ModelClasses(num_classes, classes))
