"""What can an artifact learn?  From which images, into which head, and from whom; told before any weight is loaded."""

from __future__ import annotations

from dataclasses import replace

from vitcompress.artifact.manifest import Manifest
from vitcompress.data import ImageSet, open_sets
from vitcompress.data.classes import are_own
from vitcompress.distill.losses import LOSSES
from vitcompress.distill.matching import Candidate, Comparison, check_kind, compare
from vitcompress.distill.teacher import Teacher, find_teacher
from vitcompress.errors import RecipeError, VitcompressError
from vitcompress.families.outputs import has_classes
from vitcompress.pipeline.checks import bundle_of
from vitcompress.recipe import DataRecipe, DistillRecipe, TeacherRecipe


def images_to_learn(
    recipe: DataRecipe, parent: Manifest, known: tuple[str, ...], *, num_classes: int, seed: int
) -> tuple[ImageSet, ImageSet | None]:
    """The images to learn from and to evaluate on, counted by the artifact's classes or, where others, by their own.

    Args:
        recipe: folders and the class map.
        parent: what the artifact says of itself.
        known: names of its classes, in order; empty where they are not known.
        num_classes: K of it.
        seed: which images are held out, where they must be.

    Raises:
        DataError: as `open_sets`.
        RecipeError: there are none to learn from.
    """
    bundle = bundle_of(str(parent.source["name"]), parent.classes)
    images, val = open_sets(recipe, bundle=bundle, num_classes=None, seed=seed, classes=known)
    if images is None:
        raise RecipeError("There are no images to learn from.", hint="Give --data DIR.")
    if images.labels is None:  # then the model's own classes are those of the images to evaluate on
        images, val = open_sets(recipe, bundle=bundle, num_classes=num_classes, seed=seed, classes=known)
        assert images is not None
    elif not images.streams and len(set(images.labels)) < 2:
        raise RecipeError(f"{images.name} has images of one class only.", hint="There is nothing to tell apart.")
    elif recipe.class_map is None and are_own(images.classes, num_classes, known):
        images, val = open_sets(recipe, bundle=bundle, num_classes=num_classes, seed=seed, classes=known)
        assert images is not None
        images = replace(images, classes=known)  # not the numbers that may stand for them
    return images, val


def new_head(images: ImageSet | None, known: tuple[str, ...]) -> tuple[tuple[str, ...], int | None]:
    """Names of the result's classes, and how many its new head has; None where it keeps its head."""
    if images is None or images.labels is None or images.classes == known:
        return known, None
    return images.classes, len(images.classes) or max(images.labels) + 1


def source_as_teacher(parent: Manifest) -> Teacher | None:
    """The model that the artifact was made from, where it can teach: its head was kept, and it is no place to fetch.

    It sees what it saw when the artifact was made, whatever timm says of it.

    Args:
        parent: what the artifact says of itself.
    """
    name = str(parent.source["name"])
    if not parent.source_sha256 or ":" in name:
        return None
    try:
        teacher = find_teacher(TeacherRecipe(name, None, dict(parent.source["model_args"])))
    except VitcompressError:
        return None
    return replace(teacher, config=dict(parent.data_config))


def settle_losses(
    student: Candidate, teacher: Teacher | None, recipe: DistillRecipe, images: ImageSet, classes: tuple[str, ...]
) -> Comparison:
    """Settle what the student learns: by default from labels and outputs, whichever there are.

    Args:
        student: with its new head and size.
        teacher: None where there is none.
        recipe: what is asked for.
        images: to learn from.
        classes: names of the student's classes; empty where they are not known.

    Raises:
        RecipeError: there is nothing to learn from, or what is asked for cannot be had.
    """
    taught = "logits" if has_classes(student.model) else "features"
    default = {**({"labels": 1.0} if images.labels is not None else {}), **({taught: 1.0} if teacher else {})}
    losses = {name: weight for name, weight in (default if recipe.loss is None else recipe.loss).items() if weight}
    if not losses:
        raise RecipeError(
            f"There is nothing to learn from: {images.name} has no labels, and there is no teacher whose outputs "
            f"{student.name} could be compared with.",
            hint="Give --data DIR with class folders, or --teacher MODEL of the same classes.",
        )
    if losses.get("labels") and images.labels is None:
        raise RecipeError("--loss labels needs labelled images.", hint="Give --data DIR with class folders.")
    if recipe.label_smoothing and not losses.get("labels"):
        raise RecipeError(f"--label-smoothing {recipe.label_smoothing:g}: there is no labels loss to smooth.")
    if teacher is not None:
        if teacher.classes and classes and teacher.classes != classes:
            raise RecipeError(
                f"--teacher {teacher.name} has other classes than {student.name} will have, or in another order.",
                hint="Name a teacher of the same classes.",
            )
        return compare(student, teacher.candidate, replace(recipe, loss=losses))
    check_kind(student, losses)
    if wanting := [name for name in losses if LOSSES[name].teacher]:
        raise RecipeError(
            f"--loss {', '.join(wanting)} needs a teacher of the same classes.", hint="Name it with --teacher."
        )
    return Comparison(losses)
