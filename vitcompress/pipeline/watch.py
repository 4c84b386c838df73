"""Measure what a training has reached, on a few validation images, a few times."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from vitcompress.data.calibration import draw_images
from vitcompress.data.sets import ImageSet
from vitcompress.distill.settings import Watch
from vitcompress.errors import DataError
from vitcompress.families.outputs import has_classes
from vitcompress.pipeline.run import Run
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.report.rows import MEASURES, show_measure, student_value

MIN_IMAGES, MAX_IMAGES = 100, 256  # fewer say too little


def make_watch(run: Run, student: nn.Module, reference: nn.Module | None, num_images: int) -> Watch | None:
    """Return what measures the student during its training; None where there is nothing to measure.

    It measures what the file would hold: rounded as it is stored, without what fades out.

    Args:
        run: the request, with the images.
        student: the student before it is set up for training; a copy of it is kept.
        reference: the model that outputs are compared with where images have no labels; None where
            there is none.
        num_images: number of images that there is time for.
    """
    images = run.val
    if images is None or min(num_images, num_images if images.streams else len(images)) < MIN_IMAGES:
        return None
    alone = measured_alone(images, student)
    if not alone and reference is None:
        return None
    few = draw_images(images, min(num_images, MAX_IMAGES), seed=run.recipe.run.seed)
    recipe = run.recipe.data
    if run.accelerator.device.type == "cpu":  # workers would take longer to start than to work
        recipe = replace(recipe, num_workers=0)
    evaluator = replace(run.evaluator, images=few, recipe=recipe)
    model, store = copy.deepcopy(student).eval(), run.recipe.store.kind

    def watch(step: int, kept: nn.Module) -> dict[str, float]:
        model.load_state_dict(kept.state_dict())
        round_to(model, stored_tensors(model, store), store)
        other = None if alone or reference is None else reference.to(run.accelerator.device).eval()
        try:
            accuracy = evaluator(model, other)
        except DataError as error:
            if not step:
                raise
            run.reporter.say(f"after {step:,} steps: not measured. {error}")  # like a network that fails for once
            return {}
        assert accuracy is not None  # there are images
        name = next(name for name in MEASURES if student_value(accuracy, name) is not None)
        value = student_value(accuracy, name)
        assert value is not None
        when = f"after {step:,} steps" if step else f"before training, on {accuracy.num_images} validation images"
        run.reporter.say(f"{when}: {MEASURES[name]} {show_measure(value, name)}")
        return {"images": accuracy.num_images, name: round(value, 6)}

    return watch


def measured_alone(images: ImageSet | None, student: nn.Module) -> bool:
    """Return whether the measure needs the student alone: its top-1 on labeled images."""
    return images is not None and images.labels is not None and has_classes(student)
