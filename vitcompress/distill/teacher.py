"""Whom does the student learn from?  The model itself, another of timm's, or a file of ours, on the student's views."""

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
from vitcompress.distill.matching import ComparedModel
from vitcompress.errors import RecipeError, VitcompressError
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import data_config
from vitcompress.pretrained.load import load_teacher
from vitcompress.pretrained.resolve import resolve
from vitcompress.recipe import ModelRecipe, TeacherRecipe

_FLAGS = {"MODEL ": "--teacher ", "--model-arg": "--teacher-arg"}


@dataclass(frozen=True)
class Teacher:
    """A model to learn from.

    Attributes:
        name: what it is called in reports.
        model: without its weights.
        config: timm's data config of it.
        load: gives the model with its weights, on CPU, in eval mode.
        classes: names of its classes, in order; empty where they are not known.
    """

    name: str
    model: nn.Module
    config: Mapping[str, Any]
    load: Callable[[], nn.Module]
    classes: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Of its weights, which are loaded for it."""
        return sha256_of(self.load().state_dict())

    @property
    def compared_model(self) -> ComparedModel:
        """What is compared of it before its weights are loaded."""
        return ComparedModel(self.name, self.model, self.config["input_size"])


def find_teacher(recipe: TeacherRecipe, *, checkpoint_flag: str = "--teacher-checkpoint") -> Teacher:
    """Find the teacher that `recipe` names; loads no weights.

    Args:
        recipe: its name, weights and arguments.
        checkpoint_flag: the option that its weights are given by, for messages.

    Raises:
        VitcompressError: there is none, or its weights are not there.
    """
    assert recipe.teacher is not None  # the caller has one where nothing is named
    if recipe.teacher.endswith(".safetensors"):
        return _from_artifact(Path(recipe.teacher), recipe, checkpoint_flag)
    if recipe.teacher_checkpoint is not None and not recipe.teacher_checkpoint.exists():
        raise RecipeError(f"{checkpoint_flag} {recipe.teacher_checkpoint} does not exist.")
    named = ModelRecipe(recipe.teacher, recipe.teacher_checkpoint, recipe.teacher_arg)
    with _flags_of_the_teacher(checkpoint_flag):
        source = resolve(named)
        model = empty_model(source)

    def load() -> nn.Module:
        with _flags_of_the_teacher(checkpoint_flag):
            return load_teacher(source)

    classes = label_names(source.pretrained_cfg)
    return Teacher(source.name, model, data_config(model, named), load, classes)


@contextmanager
def _flags_of_the_teacher(checkpoint_flag: str) -> Iterator[None]:
    """Let messages about a model name the flags that the teacher is given by."""
    try:
        yield
    except VitcompressError as error:
        message, hint = str(error), error.hint
        for flag, ours in {**_FLAGS, "--checkpoint": checkpoint_flag}.items():
            message, hint = message.replace(flag, ours), hint.replace(flag, ours)
        raise type(error)(message, hint=hint) from error


def _from_artifact(path: Path, recipe: TeacherRecipe, checkpoint_flag: str) -> Teacher:
    if recipe.teacher_checkpoint is not None or recipe.teacher_arg:
        raise RecipeError(
            f"--teacher {path} has its weights and sizes in it.",
            hint=f"Leave out {checkpoint_flag} and --teacher-arg.",
        )
    manifest = read_manifest(path)
    model = empty_student(path, manifest)
    return Teacher(path.name, model, manifest.data_config, lambda: load(path), manifest.classes)


def adapt_inputs(
    teacher: nn.Module, own: Mapping[str, Any], seen: Mapping[str, Any], image_size: tuple[int, int] | None
) -> None:
    """Make `teacher` take the student's views, in place: of another normalisation and, where it must, another size.

    Normalising anew is exact; resizing is bicubic with antialiasing, as views are made.

    Args:
        teacher: any model.
        own: timm's data config of the teacher.
        seen: that of the views.
        image_size: (rows, columns) to resize views to; None to leave them.
    """
    mean, std = (torch.tensor(own[name]).view(-1, 1, 1) for name in ("mean", "std"))
    seen_mean, seen_std = (torch.tensor(seen[name]).view(-1, 1, 1) for name in ("mean", "std"))
    scale, shift = seen_std / std, (seen_mean - mean) / std
    same = bool((scale == 1).all() and (shift == 0).all())

    def adapt(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal scale, shift
        images, *rest = inputs
        if not same:
            if scale.device != images.device:  # once, and fit for autograd whoever runs first
                with torch.inference_mode(False):
                    scale, shift = scale.to(images.device), shift.to(images.device)
            images = torch.addcmul(shift, images, scale)
        if image_size is not None:
            images = F.interpolate(images, image_size, mode="bicubic", antialias=True)
        return (images, *rest)

    if not same or image_size is not None:
        teacher.register_forward_pre_hook(adapt)
