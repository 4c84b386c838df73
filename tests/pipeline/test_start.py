"""How long blocks are trained, and what the command makes of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Vitcompress
from tests.factories import ARGS
from vitcompress import load
from vitcompress.pipeline.prepare import prepare
from vitcompress.pipeline.start import refinement
from vitcompress.recipe import DataRecipe, DistillRecipe, ModelRecipe, PlanRecipe, Recipe, RunRecipe, StartRecipe
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.stopwatch import Stopwatch


@pytest.mark.parametrize(
    ("refine", "distill", "batch_size", "steps"),
    [
        (None, {}, 128, 480),
        (None, {"steps": 0}, 128, 0),
        (None, {"steps": 20}, 128, 80),  # of 32 images: no more than the training sees
        (None, {"epochs": 0.5}, 2, 0),
        (7, {}, 128, 7),
        (7, {"steps": 0}, 128, 7),
        (0, {"max_minutes": 9.0}, 128, 0),
    ],
)
def test_how_many_steps_blocks_are_trained_for(
    refine: int | None, distill: dict[str, Any], batch_size: int, steps: int, flat: Path, weights: Path
) -> None:
    how = refinement(prepared(flat, weights, refine, distill, batch_size))
    assert (how.steps, how.seconds) == (steps, None)


def test_half_of_the_minutes_left_goes_to_single_blocks(flat: Path, weights: Path) -> None:
    run = prepared(flat, weights, None, {"max_minutes": 10.0}, 8)
    how = refinement(replace(run, clock=Stopwatch(time.time() - 120)))
    assert how.steps == 480
    assert how.seconds == pytest.approx(480 / 2 / 2, abs=5)  # the other half is for their inputs


def prepared(data: Path, weights: Path, refine: int | None, distill: dict[str, Any], batch_size: int) -> Any:
    recipe = Recipe(
        ModelRecipe("vit_tiny_patch16_224", checkpoint=weights, model_arg=ARGS),
        PlanRecipe(share=1, width=0.5),
        data=DataRecipe(data=str(data), val_data=str(data), num_workers=0, batch_size=batch_size),
        start=StartRecipe(refine=refine),
        distill=DistillRecipe(**distill),
        run=RunRecipe(device="cpu"),
    )
    return prepare(recipe, None, "", Reporter(quiet=True))


def test_blocks_are_trained_before_the_student_and_without_a_training_where_asked(
    flat: Path, teacher: list[str], tmp_path: Path, vitcompress: Vitcompress
) -> None:
    words = [
        "--data",
        flat,
        "--val-data",
        flat,
        "--width",
        0.5,
        "--num-workers",
        0,
        "--no-baselines",
        "--device",
        "cpu",
    ]
    for name, more in {"closed": [], "refined": ["--refine", 80], "again": ["--refine", 80]}.items():
        ended = vitcompress(
            "compress", *teacher, *words, "--steps", 0, *more, "--out", tmp_path / f"{name}.safetensors"
        )
        assert ended.code == 0, ended.err
        assert ("training 4 blocks" in ended.err) is bool(more)
    closed, refined, again = (
        load(tmp_path / f"{name}.safetensors").state_dict() for name in ("closed", "refined", "again")
    )
    changed = {name for name, value in closed.items() if not torch.equal(value, refined[name])}
    assert changed
    assert all(name.startswith("blocks.") for name in changed)
    assert all(torch.equal(value, again[name]) for name, value in refined.items())


def test_shared_blocks_are_trained_without_images_of_ones_own_and_not_before_fading(
    teacher: list[str], tmp_path: Path, vitcompress: Vitcompress
) -> None:
    words = ["--share", 2, "--start", "first", "--num-workers", 0, "--calibration-images", 8, "--steps", 0]
    for fade in (0, 0.5):
        ended = vitcompress(
            "compress", *teacher, *words, "--refine", 2, "--fade", fade, "--out", tmp_path / "m.safetensors"
        )
        assert ended.code == 0, ended.err
        assert ("training 4 blocks" in ended.err) is (fade == 0)
