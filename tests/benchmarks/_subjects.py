"""The models and images that benchmarks train and measure on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vitcompress.pipeline.calibration import with_calibration
from vitcompress.pipeline.labels import with_labels
from vitcompress.pipeline.plan import load_source
from vitcompress.pipeline.prepare import prepare
from vitcompress.pipeline.run import Run
from vitcompress.recipe import Recipe
from vitcompress.runtime.console import Reporter

SHARED = Path(__file__).parents[3] / "shared" / "data"
DEIT = {"model": "deit_tiny"}
SUBJECTS: Mapping[str, Mapping[str, Any]] = {  # flags, by name
    # its own recipe has Muon and fades, and so hides what a start needs
    "fashion": {"model": "fashion_vit", "precision": "fp32", "optimizer": "adamw", "fade": 0, "start": "calibrated"},
    "imagenet": {**DEIT, "checkpoint": SHARED / "deit_tiny.safetensors", "data": str(SHARED / "imagenet-compatible")},
    "caltech": {
        **DEIT, "checkpoint": SHARED / "deit_tiny_caltech101.safetensors", "data": str(SHARED / "caltech101"),
        "model_arg": {"num_classes": 100},
    },
}  # fmt: skip


def ready(recipe: Recipe, *, judges: bool = True) -> tuple[Run, nn.Module]:
    """Return a checked request with its calibration images drawn, and its source.

    Args:
        recipe: what to do.
        judges: draw images to judge on as well.
    """
    run = prepare(recipe, None, "", Reporter(quiet=True), measures=True)
    source = load_source(run)
    run = with_labels(run, source, stops=False)
    return with_calibration(run, source, judges=judges), source
