"""Labels are those that the teacher was trained with, or a command says that they are not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.colors import classifier, draw, folders, saved
from tests.conftest import Vitcompress
from vitcompress.measure.tally import LogitTally

NATURAL = [f"class{number}" for number in range(1, 13)]
PLAIN = ["--share", 1, "--transforms", "none", "--no-baselines", "--num-workers", 0]
Report = Callable[..., tuple[Any, str]]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model that classifies twelve colors, in timm's order of their names."""
    return saved(classifier(12), tmp_path_factory.mktemp("twelve") / "model.safetensors")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model that classifies three colors."""
    return saved(classifier(3), tmp_path_factory.mktemp("three") / "model.safetensors")


@pytest.fixture
def converted(vitcompress: Vitcompress, tmp_path: Path) -> Report:
    """Compress without training; return the accuracy in the report, and stderr."""

    def convert(model: Sequence[str], *words: object) -> tuple[Any, str]:
        out = tmp_path / "mini.safetensors"
        ended = vitcompress("compress", *model, *PLAIN, "--steps", 0, *words, "--out", out)
        assert ended.code == 0, ended.err
        return json.loads(out.with_suffix(".report.json").read_text())["accuracy"], ended.err

    return convert


@pytest.mark.parametrize("reverse", [False, True], ids=["timm", "torchvision"])
def test_the_order_in_which_the_teacher_is_right_is_taken(reverse: bool, converted: Report, tmp_path: Path) -> None:
    names = sorted(NATURAL) if reverse else NATURAL
    model = saved(classifier(12), tmp_path / "model.safetensors")
    accuracy, said = converted(model, "--val-data", folders(tmp_path / "images", names))
    assert (accuracy["teacher_top1"], accuracy["above_chance"]) == (100, True)
    assert f"classes: 12 folders in {'ASCII' if reverse else 'natural'} order, as" in said
    right = ["on 3", "on 36"] if reverse else ["on 36", "on 3"]
    assert f"Of 36 images, {model[0]} is right {right[0]} in natural order" in said


def test_the_classes_of_that_order_are_stored(converted: Report, vitcompress: Vitcompress, tmp_path: Path) -> None:
    names = sorted(NATURAL)
    model = saved(classifier(12), tmp_path / "model.safetensors")
    root = folders(tmp_path / "images", names)
    converted(model, "--val-data", root)
    few = folders(tmp_path / "few", {name: names.index(name) for name in ("class2", "class10")}, first=5)
    ended = vitcompress("evaluate", tmp_path / "mini.safetensors", "--data", few, "--num-workers", 0, "--json")
    assert json.loads(ended.out)["student_top1"] == 100
    assert "named like the model's classes" in ended.err


def test_an_order_that_the_teacher_does_not_confirm_is_asked_for(
    twelve: list[str], vitcompress: Vitcompress, tmp_path: Path
) -> None:
    shifted = {name: (number + 1) % 12 for number, name in enumerate(NATURAL)}
    words = ["compress", *twelve, *PLAIN, "--val-data", folders(tmp_path / "images", shifted), "--steps", 0]
    ended = vitcompress(*words, "--out", tmp_path / "mini.safetensors")
    assert ended.code == 2
    assert "it is not clear which folder is which class" in ended.err
    assert "--class-map" in ended.err
    assert "--class-order" in ended.err


def test_evaluate_and_export_try_both_orders(converted: Report, vitcompress: Vitcompress, tmp_path: Path) -> None:
    model = saved(classifier(12), tmp_path / "model.safetensors")
    converted(model, "--val-data", folders(tmp_path / "flat", [""]))  # without class names in the file
    root = folders(tmp_path / "images", sorted(NATURAL))
    file = tmp_path / "mini.safetensors"
    ended = vitcompress("evaluate", file, "--data", root, "--num-workers", 0, "--json")
    assert json.loads(ended.out)["student_top1"] == 100, ended.err
    words = ["export", file, "--to", "pt2", "--data", root, "--json"]
    ended = vitcompress(*words, "--out", tmp_path / "a.pt2")
    assert (json.loads(ended.out)["top1"], json.loads(ended.out)["artifact_top1"]) == (100, 100)
    ended = vitcompress(*words, "--class-order", "natural", "--out", tmp_path / "b.pt2")
    assert json.loads(ended.out)["top1"] < 50
    assert json.loads(ended.out)["notes"][0].startswith("Warning: The teacher is no better than chance")
    html = tmp_path / "page.html"
    ended = vitcompress("report", file, "--html", html, "--data", root, "--num-workers", 0)
    assert (ended.code, "in ASCII order" in ended.err) == (0, True)


@pytest.mark.parametrize("splits", [("Train", "Test"), ("Training", "Testing"), ("TRAIN", "VAL")])
def test_splits_are_not_classes(splits: tuple[str, str], three: list[str], converted: Report, tmp_path: Path) -> None:
    for first, split in enumerate(splits):
        folders(tmp_path / "images" / split, ["ant", "bee", "cat"], first=10 * first)
    accuracy, _ = converted(three, "--data", tmp_path / "images")
    assert (accuracy["teacher_top1"], accuracy["num_images"]) == (100, 9)
    assert accuracy["data"].endswith(splits[1])


@pytest.mark.parametrize(
    ("val", "missing"),
    [(["bee", "cat", "zebu"], "zebu"), (["Ant", "bee", "cat"], "Ant"), (["ant", "bee", "cat", "dog"], "dog")],
)
def test_validation_images_use_the_classes_of_training(
    val: list[str], missing: str, three: list[str], vitcompress: Vitcompress, tmp_path: Path
) -> None:
    folders(tmp_path / "images" / "train", ["ant", "bee", "cat"])
    folders(tmp_path / "images" / "val", val)
    words = ["compress", *three, *PLAIN, "--steps", 0, "--data", tmp_path / "images"]
    ended = vitcompress(*words, "--out", tmp_path / "mini.safetensors")
    assert (ended.code, f"not among the 3 known classes: {missing}" in ended.err) == (2, True)


def test_validation_images_may_lack_classes_of_training(three: list[str], converted: Report, tmp_path: Path) -> None:
    folders(tmp_path / "images" / "train", ["ant", "bee", "cat"])
    folders(tmp_path / "images" / "val", {"bee": 1, "cat": 2}, first=5)
    accuracy, said = converted(three, "--data", tmp_path / "images")
    assert accuracy["teacher_top1"] == 100
    assert "classes: 3 folders in alphabetical order" in said


def test_the_classes_of_a_file_decide(
    three: list[str], converted: Report, vitcompress: Vitcompress, tmp_path: Path
) -> None:
    converted(three, "--val-data", folders(tmp_path / "images", ["ant", "bee", "cat"]))
    file = tmp_path / "mini.safetensors"
    root = folders(tmp_path / "val", {"bee": 1, "cat": 2}, first=5)
    ended = vitcompress("evaluate", file, "--data", root, "--num-workers", 0, "--json")
    assert json.loads(ended.out)["student_top1"] == 100
    folders(root, {"zebu": 0})
    ended = vitcompress("evaluate", file, "--data", root, "--num-workers", 0)
    assert (ended.code, "not among the 3 known classes: zebu" in ended.err) == (2, True)


def wrong_order(root: Path, each: int) -> Path:
    return folders(root, {"ant": 1, "bee": 2, "cat": 0}, each)


def test_a_teacher_at_chance_ends_a_training(three: list[str], vitcompress: Vitcompress, tmp_path: Path) -> None:
    root = wrong_order(tmp_path / "images", 12)
    words = ["compress", *three, *PLAIN, "--val-data", root, "--data", root, "--batch-size", 4, "--lr", 1e-4]
    words = [*words, "--save-every", "none", "--out", tmp_path / "mini.safetensors"]
    ended = vitcompress(*words, "--steps", 2)
    assert (ended.code, list(tmp_path.glob("mini*"))) == (2, [])
    assert "is no better than chance" in ended.err
    for cause in ("--class-order", "--mean", "--checkpoint", "head", "--allow-weak-teacher"):
        assert cause in ended.err
    ended = vitcompress(*words, "--steps", 2, "--allow-weak-teacher", "--max-drop", 50)
    assert (ended.code, "Warning: " in ended.err, "no gate is met" in ended.out + ended.err) == (3, True, True)
    ended = vitcompress(*words, "--steps", 0)
    assert (ended.code, "Warning: " in ended.err, "Warning: The teacher" in ended.out) == (0, True, True)
    for gate in (["--max-drop", 50], ["--min-ratio", 0.5]):
        assert vitcompress("check", tmp_path / "mini.safetensors", *gate).code == 3
    ended = vitcompress("evaluate", tmp_path / "mini.safetensors", "--data", root, "--num-workers", 0)
    assert (ended.code, "Warning: The" in ended.out) == (0, True)


def test_with_few_images_a_teacher_at_chance_is_a_note(three: list[str], converted: Report, tmp_path: Path) -> None:
    accuracy, said = converted(three, "--val-data", wrong_order(tmp_path / "images", 3))
    assert accuracy["above_chance"] is False
    assert ("too few to be sure" in said, "Warning" in said) == (True, False)


def test_a_plan_says_that_the_teacher_is_at_chance(three: list[str], vitcompress: Vitcompress, tmp_path: Path) -> None:
    root = wrong_order(tmp_path / "images", 14)
    words = ["plan", *three, "--calibrate", root, "--kinds", "share", "--calibration-images", 4]
    ended = vitcompress(*words)
    assert (ended.code, "Warning: The model" in ended.err) == (0, True)
    (tmp_path / "classes.txt").write_text("cat\nant\nbee\n")
    assert "Warning" not in vitcompress(*words, "--class-map", tmp_path / "classes.txt").err


def test_a_new_head_has_no_hidden_folder_and_no_class_without_images(
    made: Path, vitcompress: Vitcompress, tmp_path: Path
) -> None:
    root = folders(tmp_path / "images", ["ant", "bee", "cat"])
    draw(root / ".ipynb_checkpoints" / "0.png", 0)
    words = ["finetune", made / "mini.safetensors", "--data", root, "--steps", 1, "--batch-size", 2, "--lr", 1e-4]
    words = [*words, "--num-workers", 0, "--save-every", "none", "--out", tmp_path / "new.safetensors"]
    ended = vitcompress(*words)
    assert (ended.code, "new head for 3 classes" in ended.err, "1 file left out: 1 hidden." in ended.err) == (
        0,
        True,
        True,
    )
    (root / "dog").symlink_to(tmp_path / "gone")
    ended = vitcompress(*words)
    assert (ended.code, "class folders without images: dog" in ended.err) == (2, True)


def test_finetune_tries_both_orders_of_numbers(converted: Report, vitcompress: Vitcompress, tmp_path: Path) -> None:
    model = saved(classifier(12), tmp_path / "model.safetensors")
    converted(model, "--val-data", folders(tmp_path / "flat", [""]))  # without class names in the file
    root = folders(tmp_path / "images", sorted(map(str, range(12))), each=4)
    words = ["finetune", tmp_path / "mini.safetensors", "--data", root, "--steps", 1, "--batch-size", 2, "--lr", 1e-6]
    words = [*words, "--num-workers", 0, "--save-every", "none", "--out", tmp_path / "tuned.safetensors"]
    ended = vitcompress(*words)
    assert (ended.code, "classes: 12 folders in ASCII order" in ended.err) == (0, True), ended.err
    report = json.loads((tmp_path / "tuned.report.json").read_text())
    assert report["before"]["student_top1"] == 100


def test_a_comparison_warns_of_a_teacher_at_chance(
    three: list[str], converted: Report, vitcompress: Vitcompress, tmp_path: Path
) -> None:
    converted(three, "--val-data", wrong_order(tmp_path / "images", 12))
    file = tmp_path / "mini.safetensors"
    assert "mini.safetensors: Warning: The teacher" in vitcompress("compare", file, file).out
    first = vitcompress("report", file).out.split("Warning: The teacher")[1]
    assert "Converted without training" in first  # the warning comes first


def test_a_named_teacher_at_chance_ends_a_training(three: list[str], vitcompress: Vitcompress, tmp_path: Path) -> None:
    root = folders(tmp_path / "images", ["ant", "bee", "cat"], each=12)
    permuted = classifier(3)
    with torch.no_grad():
        permuted.head.weight.copy_(permuted.head.weight.roll(1, 0))  # type: ignore[union-attr, operator]
        permuted.head.bias.copy_(permuted.head.bias.roll(1, 0))  # type: ignore[union-attr, operator]
    save_file(permuted.state_dict(), tmp_path / "permuted.safetensors")
    named = ["--teacher", three[0], "--teacher-checkpoint", tmp_path / "permuted.safetensors"]
    arguments = [word.replace("--model-arg", "--teacher-arg") for word in three[1:-2]]
    words = ["compress", *three, *PLAIN, *named, *arguments, "--data", root, "--val-data", root, "--batch-size", 4]
    words = [*words, "--loss", "logits=1", "--steps", 2, "--lr", 1e-4, "--save-every", "none"]
    ended = vitcompress(*words, "--out", tmp_path / "mini.safetensors")
    assert (ended.code, f"The model {three[0]} is no better than chance" in ended.err) == (2, True), ended.err


@pytest.mark.parametrize(("in_one_class", "right", "above"), [(36, 36, False), (20, 40, True), (40, 39, True)])
def test_chance_is_the_share_of_the_commonest_class(in_one_class: int, right: int, above: bool) -> None:
    labels = torch.tensor([0] * in_one_class + [1] * (40 - in_one_class))
    predictions = torch.where(torch.arange(40) < right, labels, 1 - labels)
    tally = LogitTally()
    tally.add(torch.nn.functional.one_hot(predictions, 2).float(), None, labels)
    accuracy = tally.result("images")
    assert (accuracy.chance_top1, accuracy.above_chance) == (2.5 * in_one_class if in_one_class < 40 else 50, above)
