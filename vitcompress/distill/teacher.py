"""Find the teacher, a timm model or an artifact, and adapt it to the student's views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.load import empty_student, load
from vitcompress.artifact.read import read_manifest
from vitcompress.data.classes import label_names
from vitcompress.distill.matching import ComparedModel, Matching
from vitcompress.errors import RecipeError, VitcompressError
from vitcompress.families.outputs import tell_outputs
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import data_config
from vitcompress.pretrained.load import load_pretrained
from vitcompress.pretrained.resolve import resolve
from vitcompress.recipe import ModelRecipe, TeacherRecipe
from vitcompress.recipe.student import OutputName

_FLAGS = {"MODEL ": "--teacher ", "--model-arg": "--teacher-arg"}


@dataclass(frozen=True)
class Teacher:
    """A model to learn from.

    Attributes:
        name: as shown in reports.
        model: without its weights.
        config: its timm data config.
        load: returns the model with its weights, on CPU, in eval mode; may be given what receives
            sentences on what was done with the weights.
        classes: names of its classes, in order; empty if unknown.
    """

    name: str
    model: nn.Module
    config: Mapping[str, Any]
    load: Callable[..., nn.Module]
    classes: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Load the weights and return their digest."""
        return sha256_of(self.load().state_dict())

    @property
    def compared_model(self) -> ComparedModel:
        """The teacher without its weights, to match with a student."""
        return ComparedModel(self.name, self.model, self.config["input_size"])


def find_teacher(
    recipe: TeacherRecipe, *, outputs: OutputName | None = None, checkpoint_flag: str = "--teacher-checkpoint"
) -> Teacher:  # fmt: skip
    """Find the teacher that `recipe` names, without loading its weights.

    Args:
        recipe: its name, weights and arguments.
        outputs: what its outputs are, whatever its files tell; None for what they tell.
        checkpoint_flag: the option that names its weights, for messages.

    Raises:
        VitcompressError: the teacher or its weights do not exist.
    """
    assert recipe.teacher is not None  # the caller checks
    if recipe.teacher.endswith(".safetensors"):
        return _from_artifact(Path(recipe.teacher), recipe, outputs, checkpoint_flag)
    if recipe.teacher_checkpoint is not None and not recipe.teacher_checkpoint.exists():
        raise RecipeError(f"{checkpoint_flag} {recipe.teacher_checkpoint} does not exist.")
    model_recipe = ModelRecipe(
        recipe.teacher, recipe.teacher_checkpoint, recipe.teacher_arg, outputs=outputs,
        checkpoint_key=recipe.teacher_checkpoint_key,
    )  # fmt: skip
    with _naming_teacher_flags(checkpoint_flag):
        source = resolve(model_recipe)
        model = empty_model(source)

    def load(tell: Callable[[str], object] = lambda text: None) -> nn.Module:
        with _naming_teacher_flags(checkpoint_flag):
            return load_pretrained(source, lambda text: tell(_with_teacher_flags(text, checkpoint_flag)))

    try:
        config = data_config(model, model_recipe)
    except RecipeError as error:
        raise RecipeError(f"--teacher {error}", hint="Correct the config of the teacher.") from error
    return Teacher(source.name, model, config, load, label_names(source.pretrained_cfg))


@contextmanager
def _naming_teacher_flags(checkpoint_flag: str) -> Iterator[None]:
    """Replace the flags of the model in error messages by those of the teacher."""
    try:
        yield
    except VitcompressError as error:
        message, hint = (_with_teacher_flags(text, checkpoint_flag) for text in (str(error), error.hint))
        raise type(error)(message, hint=hint) from error


def _with_teacher_flags(text: str, checkpoint_flag: str) -> str:
    for flag, teacher_flag in {**_FLAGS, "--checkpoint": checkpoint_flag}.items():
        text = text.replace(flag, teacher_flag)
    return text


def _from_artifact(path: Path, recipe: TeacherRecipe, outputs: OutputName | None, checkpoint_flag: str) -> Teacher:
    if recipe.teacher_checkpoint is not None or recipe.teacher_arg:
        raise RecipeError(
            f"--teacher {path} is a file with its own weights and sizes.",
            hint=f"Leave out {checkpoint_flag} and --teacher-arg.",
        )
    manifest = read_manifest(path)
    model = empty_student(path, manifest)
    if outputs is not None:
        tell_outputs(model, outputs, name=str(path))
    return Teacher(path.name, model, manifest.data_config, lambda *tell: load(path), manifest.classes)


def adapt_inputs(
    teacher: nn.Module, config: Mapping[str, Any], view_config: Mapping[str, Any], image_size: tuple[int, int] | None
) -> None:
    """Make `teacher` take the student's views, in place: change normalization and, if needed, size.

    The change of normalization is exact; resizing is bicubic with antialiasing, like the views.

    Args:
        teacher: any model.
        config: timm's data config of the teacher.
        view_config: timm's data config of the views.
        image_size: (height, width) to resize views to; None to keep their size.
    """
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    view_mean, view_std = (torch.tensor(view_config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    scale, shift = view_std / std, (view_mean - mean) / std
    same = bool((scale == 1).all() and (shift == 0).all())

    def adapt(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal scale, shift
        images, *rest = inputs
        if not same:
            if scale.device != images.device:  # once; not as inference tensors, which autograd cannot use
                with torch.inference_mode(False):
                    scale, shift = scale.to(images.device), shift.to(images.device)
            images = torch.addcmul(shift, images, scale)
        if image_size is not None:
            images = F.interpolate(images, image_size, mode="bicubic", antialias=True)
        return (images, *rest)

    if not same or image_size is not None:
        teacher.register_forward_pre_hook(adapt)


def load_adapted(
    teacher: Teacher, config: dict[str, Any], matching: Matching, tell: Callable[[str], object]
) -> nn.Module:
    """Load a teacher that accepts the student's views.

    Args:
        teacher: the teacher to load.
        config: timm's data config of the views.
        matching: says whether views must be resized.
        tell: receives sentences on what was done with its weights.
    """
    model = teacher.load(tell)
    adapt_inputs(model, teacher.config, config, matching.image_size)
    return model
