"""Decide what a model is fine-tuned on: its images, head, teacher and losses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vitcompress.artifact.manifest import Manifest
from vitcompress.data.classes import ModelClasses, are_model_classes
from vitcompress.data.open import open_sets
from vitcompress.data.sets import ImageSet
from vitcompress.distill.losses import LOSSES
from vitcompress.distill.matching import ComparedModel, Matching, check_kind, match_models
from vitcompress.distill.teacher import Teacher
from vitcompress.errors import RecipeError, shorten
from vitcompress.families.outputs import outputs_of
from vitcompress.pipeline.checks import bundle_of
from vitcompress.recipe import DataRecipe, DistillRecipe


def images_to_learn(
    recipe: DataRecipe, parent: Manifest, model: ModelClasses, *, seed: int
) -> tuple[ImageSet, ImageSet | None]:
    """Open the images to train and to evaluate on.

    Labels are the artifact's classes; the images' own classes where those differ.

    Args:
        recipe: folders and the class map.
        parent: manifest of the artifact.
        model: the artifact's classes; 0 of them where its outputs are no classes.
        seed: selects the images that are held out, where there is no validation split.

    Raises:
        DataError: as `open_sets`.
        RecipeError: there are no images to train on, or only of one class.
    """
    bundle = bundle_of(str(parent.source["name"]), parent.classes)
    open_with = partial(open_sets, recipe, bundle=bundle, seed=seed)
    images, val = open_with(model=ModelClasses(None, model.names))
    if images is None:
        raise RecipeError("There are no images to learn from.", hint="Give --data DIR.")
    if images.labels is None:  # images to evaluate on are labeled by the model's classes
        return images, open_with(model=model)[1]
    if not images.streams and len(set(images.labels)) < 2:
        raise RecipeError(f"{images.name} has images of only one class.", hint="Give images of at least two classes.")
    if recipe.class_map is None and recipe.class_order is None and are_model_classes(images.classes, model):
        images, val = open_with(model=model)
        assert images is not None
        return replace(images, classes=model.names), val  # names, where folders may be named by numbers
    if images.empty:
        raise RecipeError(
            f"{images.name}: class folders without images: {shorten(images.empty)}. The new head would lack them.",
            hint="Add images, or remove the folders.",
        )
    return images, val


def new_head(
    images: ImageSet | None, known: tuple[str, ...], *, has_classes: bool
) -> tuple[tuple[str, ...], int | None]:
    """Return the class names of the result, and the size of its new head or None.

    Args:
        images: training images.
        known: names of the artifact's classes or labels, in order; empty where they are not known.
        has_classes: whether the artifact's outputs are classes; labels of images train no others.
    """
    if images is None or images.labels is None or (has_classes and images.classes == known):
        return known, None
    return images.classes, len(images.classes) or max(images.labels) + 1


def settle_losses(
    student: ComparedModel, teacher: Teacher | None, recipe: DistillRecipe, images: ImageSet, classes: tuple[str, ...]
) -> Matching:
    """Decide the losses: by default labels and the teacher's outputs, where there are any.

    Args:
        student: the student with its new head and size.
        teacher: the teacher; None where there is none.
        recipe: losses and layers.
        images: training images.
        classes: names of the student's classes; empty where they are not known.

    Raises:
        RecipeError: there is nothing to learn from, or a loss does not fit.
    """
    outputs = outputs_of(student.model).loss
    default = {**({"labels": 1.0} if images.labels is not None else {}), **({outputs: 1.0} if teacher else {})}
    losses = {name: weight for name, weight in (default if recipe.loss is None else recipe.loss).items() if weight}
    if not losses:
        raise RecipeError(
            f"There is nothing to learn from: {images.name} has no labels, and there is no teacher for {student.name}.",
            hint="Give --data DIR with class folders, or --teacher MODEL of the same classes.",
        )
    if losses.get("labels") and images.labels is None:
        raise RecipeError("--loss labels needs labeled images.", hint="Give --data DIR with class folders.")
    if recipe.label_smoothing and not losses.get("labels"):
        raise RecipeError(f"--label-smoothing {recipe.label_smoothing:g}: there is no labels loss to smooth.")
    if teacher is not None:
        if teacher.classes and classes and teacher.classes != classes:
            raise RecipeError(
                f"--teacher {teacher.name} has other classes than {student.name}, or another order of classes.",
                hint="Name a teacher of the same classes.",
            )
        return match_models(student, teacher.compared_model, replace(recipe, loss=losses))
    check_kind(student, losses)
    if unmet := [name for name in losses if LOSSES[name].teacher]:
        raise RecipeError(
            f"--loss {', '.join(unmet)} needs a teacher of the same classes.", hint="Name it with --teacher."
        )
    return Matching(losses)
