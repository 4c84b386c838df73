"""Draw a run's calibration images, with the model's predictions where images have no labels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vitcompress.data.calibration import Drawing, draw_calibration, predicted_classes
from vitcompress.data.sets import ImageSet
from vitcompress.families.outputs import has_classes
from vitcompress.pipeline.run import Run
from vitcompress.runtime.processes import from_main


def with_calibration(
    run: Run, source: nn.Module, count: int | None = None, *, fits: bool = True, judges: bool = True
) -> Run:  # fmt: skip
    """Return the run with its calibration images drawn; the main process draws, and says how many.

    Args:
        run: a run with training images.
        source: the model that is compressed, in eval mode; its classes are spread.
        count: number of images to fit to; None for that of the recipe, or the default.
        fits: whether a start is fitted to images.
        judges: whether something is measured on images that nothing was fitted to.
    """
    if not (fits or judges):
        return run
    assert run.train is not None  # `prepare` made sure
    drawing = None
    if run.accelerator.is_main_process:

        def classify(images: ImageSet) -> dict[int, int]:
            with run.reporter.counting("predicting classes", brief=True) as tell:
                return predicted_classes(images, predict, run.config, run.recipe.data, tell)

        def predict(images: Tensor) -> Tensor:
            logits: Tensor = source(images.to(run.accelerator.device))
            return logits

        with torch.no_grad():
            drawing = draw_calibration(
                run.train, count or run.recipe.start.calibration_images, seed=run.recipe.run.seed,
                classify=classify if has_classes(source) else None,
            )  # fmt: skip
    drawing = from_main(drawing, run.accelerator)
    assert drawing is not None  # the main process drew
    run.reporter.say(_line(drawing, fits=fits, judges=judges))
    return replace(run, drawn=drawing)


def _line(drawing: Drawing, *, fits: bool, judges: bool) -> str:
    """Describe what the images are used for."""
    fitted, judged = len(drawing.fitted), len(drawing.judged)
    if not fits:
        return f"start: judged on {_count(judged, 'image', 'images')}"
    line = f"start: fitted to {_count(fitted, 'image', 'images')}"
    if drawing.num_classes:
        line += f" of {_count(drawing.num_classes, 'class', 'classes')}"
    if judges:
        line += f", judged on {'it' if drawing.judged == drawing.fitted else _count(judged, 'other', 'others')}"
    return line


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"
