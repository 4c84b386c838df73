"""Which images a command fits its starts to, and what it says of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import Vitcompress, draw_image
from tests.factories import ARGS, tiny
from vitcompress.data.calibration import Drawing
from vitcompress.data.sets import ImageSet
from vitcompress.measure.accuracy import Evaluator
from vitcompress.pipeline import plan, start
from vitcompress.pipeline.calibration import with_calibration
from vitcompress.pipeline.plan import load_source
from vitcompress.pipeline.prepare import prepare
from vitcompress.pipeline.run import Run
from vitcompress.recipe import DataRecipe, ModelRecipe, Recipe, RunRecipe, StartRecipe
from vitcompress.runtime.console import Reporter


def prepared(data: Path, weights: Path, images: int | None = None) -> Run:
    recipe = Recipe(
        ModelRecipe("vit_tiny_patch16_224", checkpoint=weights, model_arg=ARGS),
        data=DataRecipe(data=str(data), val_data=str(data), num_workers=0),
        start=StartRecipe(calibration_images=images),
        run=RunRecipe(device="cpu"),
    )
    return prepare(recipe, None, "", Reporter(quiet=True), measures=True)


def predicting_brightness() -> nn.Module:
    """A model with classes that calls light images 1 and dark ones 0."""

    class Brightness(nn.Module):
        num_classes = 5

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot((images.mean((1, 2, 3)) > 0).long(), self.num_classes).float()

    return Brightness()


def test_unlabeled_images_are_spread_over_the_classes_that_the_model_predicts(tmp_path: Path, weights: Path) -> None:
    for number in range(40):
        draw_image(tmp_path / f"{number:02}.png", number)
    run = prepared(tmp_path, weights, 8)
    assert run.train is not None
    model = predicting_brightness()
    light = [int(model(run._images_at((number,)).__next__()).argmax()) for number in range(40)]
    assert 0 < sum(light) < 40
    run = with_calibration(run, model)
    few = min(4, sum(light), 40 - sum(light))
    spread = Counter(light[number] for number in run.drawing.fitted)
    assert sorted(spread.values()) == [few, 8 - few]
    assert with_calibration(run, model).drawing == run.drawing


def test_both_commands_see_the_same_images_and_no_image_twice(flat: Path, weights: Path) -> None:
    runs = [prepared(flat, weights, 8) for _ in range(2)]
    parts = [
        (torch.cat(list(run.calibration())), torch.cat(list(run.judged())))
        for run in (with_calibration(run, load_source(run)) for run in runs)
    ]
    assert [len(part) for part in parts[0]] == [8, 4]
    assert all(torch.equal(*pair) for pair in zip(*parts, strict=True))
    assert len({view.numpy().tobytes() for part in parts[0] for view in part}) == 12


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--steps", 0], "start: fitted to 9 images of "),
        (["--steps", 0, "--calibration-images", 6], "start: fitted to 6 images of "),
        (["--steps", 1, "--batch-size", 2], ", judged on 3 others"),
        (["--steps", 1, "--batch-size", 2, "--start", "first"], "start: judged on 3 images"),
        (["--steps", 0, "--start", "first"], ""),
        (["--steps", 1, "--batch-size", 2, "--start", "first", "--lr", 1e-4], ""),
    ],
)
def test_the_screen_tells_how_many_images_are_fitted_and_judged(
    words: list[object], line: str, flat: Path, teacher: list[str], tmp_path: Path, vitcompress: Vitcompress
) -> None:
    command = ["compress", *teacher, "--data", flat, "--val-data", flat, "--share", 2, "--num-workers", 0, *words]
    ended = vitcompress(*command, "--no-baselines", "--device", "cpu", "--out", tmp_path / "mini.safetensors")
    assert ended.code == 0, ended.err
    assert line in ended.err
    assert ("start: " in ended.err) == bool(line)


def test_a_single_image_is_fitted_to_and_judged_on(
    teacher: list[str], tmp_path: Path, vitcompress: Vitcompress
) -> None:
    draw_image(tmp_path / "images" / "0.png", 0)
    words = ["--data", tmp_path / "images", "--val-data", tmp_path / "images", "--share", 2, "--num-workers", 0]
    words += ["--steps", 1, "--batch-size", 1, "--no-baselines", "--out", tmp_path / "mini.safetensors"]
    ended = vitcompress("compress", *teacher, *words)
    assert ended.code == 0, ended.err
    assert "start: fitted to 1 image of 1 class, judged on it" in ended.err


def test_labels_are_taken_instead_of_predictions(images: Path, weights: Path) -> None:
    run = prepared(images / "train", weights, 5)
    run = with_calibration(run, tiny())
    assert run.train is not None
    assert sorted(run.train.label(run.train.indices[number]) for number in run.drawing.fitted) == [0, 1, 2, 3, 4]
    assert len(run.drawing.judged) == 10


def test_the_learning_rate_follows_from_images_that_nothing_was_fitted_to(
    flat: Path, teacher: list[str], weights: Path, tmp_path: Path, vitcompress: Vitcompress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[torch.Tensor] = []

    def measure(student: nn.Module, source: nn.Module, images: torch.Tensor) -> tuple[float, float]:
        seen.append(images)
        return 0.5, 1.0

    monkeypatch.setattr(start, "divergence_and_chance", measure)
    words = ["--data", flat, "--val-data", flat, "--share", 2, "--num-workers", 0, "--calibration-images", 8]
    words += ["--steps", 1, "--batch-size", 2, "--no-baselines", "--device", "cpu", "--out", tmp_path / "m.safetensors"]
    ended = vitcompress("compress", *teacher, *words)
    assert ended.code == 0, ended.err
    run = prepared(flat, weights, 8)
    run = with_calibration(run, load_source(run))
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.cat(list(run.judged())))


def test_a_drop_is_measured_on_images_that_are_not_drawn(flat: Path, weights: Path) -> None:
    run = prepared(flat, weights, 4)  # with eight others that are judged on
    source = load_source(run)
    run = replace(with_calibration(run, source), drawn=Drawing(0, (3, 1), (4, 7)))
    watched: list[ImageSet] = []

    def evaluator(images: ImageSet, *rest: Any) -> Evaluator:
        watched.append(images)
        return Evaluator(images, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "Evaluator", evaluator)
        assert plan._drop(run, source, source) == 0
    assert sorted(watched[0].indices) == [0, 2, 5, 6, 8, 9, 10, 11]
