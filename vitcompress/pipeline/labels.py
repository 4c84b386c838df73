"""Check the labels of images by the teacher's predictions, before anything is built on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.data.calibration import draw_images
from vitcompress.data.classes import Numbering
from vitcompress.data.numbering import HINT_ORDER
from vitcompress.data.sets import ImageSet, renumbered
from vitcompress.errors import DataError, RecipeError
from vitcompress.families.outputs import has_classes
from vitcompress.measure.accuracy import Evaluator
from vitcompress.measure.chance import SIGNIFICANCE, at_least
from vitcompress.measure.results import MIN_IMAGES, Accuracy
from vitcompress.pipeline.run import Run
from vitcompress.recipe import DataRecipe
from vitcompress.report.remarks import CAUSES_OF_CHANCE, chance_remark
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.processes import from_main

JUDGED_IMAGES = 256  # labeled images that the teacher's predictions are checked on


def tell_images(reporter: Reporter, *sets: ImageSet | None) -> list[str]:
    """Say how classes are numbered and what was left out; return these lines, for the report."""
    given = [images for images in sets if images is not None]
    lines = [note for images in given for note in images.notes]
    lines += [line for images in given if (line := numbered_line(images))][:1]
    lines = list(dict.fromkeys(lines))
    for line in lines:
        reporter.say(line)
    return lines


def numbered_line(images: ImageSet) -> str:
    """Return how the classes of images are numbered; empty where that is not decided yet."""
    numbering = images.numbering
    return str(numbering) if numbering and not numbering.others else ""


def classes_of(*sets: ImageSet | None) -> tuple[str, ...]:
    """Return the class names, in order, of the first images that name all classes; else nothing.

    Images whose numbering the teacher still has to decide do not count.
    """
    settled = (images for images in sets if images and not (images.numbering and images.numbering.others))
    return next((images.classes for images in settled if images.classes), ())


def with_labels(run: Run, source: nn.Module, *, stops: bool) -> Run:
    """Return the run with labels that the source's predictions agree with; the main process checks.

    Args:
        run: the request.
        source: the model that is compressed, in eval mode on the device.
        stops: whether a source that is no better than chance ends the run.

    Raises:
        DataError: two orders of classes are as plausible.
        RecipeError: the source is no better than chance, and the run must not go on.
    """
    judged = _judged_set(run.val, run.train)
    if judged is None or not has_classes(source):
        return run
    checked = None
    if run.accelerator.is_main_process:
        checked = judge(judged, source, run.config, run.recipe.data, run.source.name, seed=run.recipe.run.seed)
    checked = from_main(checked, run.accelerator)
    assert checked is not None  # the main process judged
    notes = list(run.notes)
    if checked.line:
        run.reporter.say(checked.line)
        notes.append(checked.line)
    if checked.accuracy is not None:
        _alarm(run, checked.accuracy, stops=stops, name=run.source.name)
    if run.train is not None and run.train is not judged and run.train.streams and run.train.numbering is not None:
        _check(run, source, run.train, run.source.name, stops=stops)  # the labels of a stream were not seen before
    train, val = (renumbered(images, checked.numbering) if images else None for images in (run.train, run.val))
    return replace(run, train=train, val=val, notes=tuple(notes), classes=run.classes or classes_of(train, val))


def check_teacher(run: Run, teacher: nn.Module, *, stops: bool) -> None:
    """Check a named teacher's predictions against the labels.

    Args:
        run: the request, with a teacher other than the source.
        teacher: it, ready for the student's views.
        stops: whether a teacher that is no better than chance ends the run.

    Raises:
        RecipeError: the teacher is no better than chance, and the run must not go on.
    """
    judged = _judged_set(run.val, run.train)
    if judged is not None and run.teacher is not None and has_classes(teacher):
        _check(run, teacher.to(run.accelerator.device).eval(), judged, run.teacher.name, stops=stops)


def _check(run: Run, model: nn.Module, images: ImageSet, name: str, *, stops: bool) -> None:
    """Warn if a model is no better than chance on labeled images; the main process measures."""
    accuracy = None
    if run.accelerator.is_main_process:
        drawn = draw_images(images, JUDGED_IMAGES, seed=run.recipe.run.seed)
        accuracy = Evaluator(drawn, run.config, run.recipe.data)(model, None)
    accuracy = from_main(accuracy, run.accelerator)
    if accuracy is not None:
        _alarm(run, accuracy, stops=stops, name=name)


def _alarm(run: Run, accuracy: Accuracy, *, stops: bool, name: str) -> None:
    remark = chance_remark(accuracy, f"The model {name}")
    if accuracy.is_at_chance:
        if stops and not run.recipe.teacher.allow_weak_teacher:
            raise RecipeError(remark, hint=f"{CAUSES_OF_CHANCE} --allow-weak-teacher trains anyway.")
        remark = f"Warning: {remark} {CAUSES_OF_CHANCE}"
    if remark:
        run.reporter.say(remark)


@dataclass(frozen=True)
class Judged:
    """What a model's predictions say about the labels of images.

    Attributes:
        numbering: the numbering that is right.
        line: how it was chosen; empty where there was no choice.
        accuracy: accuracy of the model on the images; None where all were unreadable.
    """

    numbering: Numbering
    line: str
    accuracy: Accuracy | None


def judge(
    images: ImageSet, model: nn.Module, config: Mapping[str, Any], recipe: DataRecipe, name: str, *, seed: int = 0
) -> Judged:
    """Choose the numbering of classes under which a model is right.

    Args:
        images: labeled images; at most 256 of them are used.
        model: a classifier in eval mode.
        config: timm's data config.
        recipe: batch size and workers.
        name: name of the model in messages.
        seed: decides which images are used.

    Raises:
        DataError: numberings are as plausible, and none is the default.
    """
    assert images.numbering is not None  # the images are labeled
    labels, predictions = [], []

    def watch(_: Tensor, logits: Tensor, __: Tensor | None, labeled: Tensor) -> None:
        labels.append(labeled)
        predictions.append(logits.argmax(1))

    drawn = draw_images(images, JUDGED_IMAGES, seed=seed)
    accuracy = Evaluator(drawn, config, recipe)(model, None, watch=watch)
    first, *others = candidates = (images.numbering, *images.numbering.others)
    if not others:
        return Judged(first, "", accuracy)
    predicted, given = torch.cat(predictions), torch.cat(labels)
    right = [predicted == _moved(given, first, candidate) for candidate in candidates]
    best = max(range(len(right)), key=lambda number: int(right[number].sum()))
    wins = all(_is_better(right[best], other) for number, other in enumerate(right) if number != best)
    counts = [f"on {int(r.sum())} {candidate.how}" for r, candidate in zip(right, candidates, strict=True)]
    told = f"of {len(given)} images, {name} is right {', '.join(counts)}"
    if not wins and not first.has_default:
        raise DataError(f"{images.name}: it is not clear which folder is which class: {told}.", hint=HINT_ORDER)
    chosen = candidates[best] if wins else first
    numbering = replace(chosen, others=(), has_default=True)
    if chosen is not first:  # the accuracy above is that of other labels
        accuracy = judge(renumbered(images, numbering), model, config, recipe, name, seed=seed).accuracy
    return Judged(numbering, f"{numbering}. {told[0].upper()}{told[1:]}.", accuracy)


def _moved(labels: Tensor, before: Numbering, after: Numbering) -> Tensor:
    """Return labels `[N]` in another numbering of the same classes."""
    table = torch.arange(before.count)
    for name, index in before.index_of.items():
        table[index] = after.index_of[name]
    return table[labels]


def _is_better(one: Tensor, other: Tensor) -> bool:
    """Return whether a sign test finds one numbering right more often; both `[N]` bool."""
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    return at_least(only_one, only_one + only_other, 0.5) < SIGNIFICANCE


def _judged_set(*sets: ImageSet | None) -> ImageSet | None:
    """Return the first labeled set with enough images, or else the first labeled one."""
    labeled: Sequence[ImageSet] = [images for images in sets if images is not None and images.numbering is not None]
    enough = (images for images in labeled if images.streams or len(images) >= MIN_IMAGES)
    return next(enough, labeled[0] if labeled else None)
