"""Models whose outputs are labels or numbers: every command knows it, and says it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vitcompress as package
from tests.conftest import ARCHITECTURE, Vitcompress, model_flags
from tests.factories import tiny
from vitcompress.artifact.read import read_manifest
from vitcompress.families.outputs import outputs_of
from vitcompress.measure.examples import Example, Examples

FAST = ("--num-workers", 0, "--device", "cpu", "--quiet", "--batch-size", 6, "--save-every", "none", "--no-baselines")
SHARED = ("--share", 2, "--start", "first", "--transforms", "none")
Flags = Callable[..., list[str]]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Flags:
    """Return MODEL and the flags of a tiny model with so many outputs, all raised by a number."""

    def of(num_outputs: int, *, raised: float = 0.0, teacher: bool = False) -> list[str]:
        model = tiny(num_classes=num_outputs)
        head: Any = model.head
        with torch.no_grad():
            head.weight.mul_(20)
            head.bias.add_(raised)
        path = tmp_path_factory.mktemp("outputs") / "weights.safetensors"
        save_file(model.state_dict(), path)
        words = [*model_flags(num_classes=num_outputs), "--checkpoint", str(path)]
        if not teacher:
            return [ARCHITECTURE, *words]
        words = [word.replace("--model-arg", "--teacher-arg") for word in words]
        return ["--teacher", ARCHITECTURE, *[word.replace("--checkpoint", "--teacher-checkpoint") for word in words]]

    return of


@pytest.fixture(scope="module")
def number(flags: Flags) -> list[str]:
    """MODEL and the flags of a model with a single output."""
    return flags(1)


def report_of(out: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(out.with_suffix(".report.json").read_text(encoding="utf-8"))
    return tree


def test_a_single_output_is_a_number_that_is_learned_and_measured(
    number: list[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    """Class folders do not matter to it. Softmax would call every loss and difference zero."""
    out = tmp_path / "m.safetensors"
    loud = [word for word in FAST if word != "--quiet"]
    ended = vitcompress(
        "compress", *number, "--data", images, "--steps", 12, "--refine", 0, *SHARED, *loud, "--out", out
    )
    assert ended.code == 0, ended.err
    report = report_of(out)
    assert report["outputs"] == report["accuracy"]["outputs"] == "regression"
    accuracy = report["accuracy"]
    assert accuracy["r2"] < 1
    assert accuracy["relative_rmse"] == pytest.approx((1 - accuracy["r2"]) ** 0.5, rel=1e-3)
    assert (accuracy["agreement"], accuracy["student_top1"]) == (None, None)
    curve = report["train"]["loss_curve"]
    assert curve[0]["logits"] > 0.05
    assert any("taken for a number" in note for note in report["notes"])
    assert "R² against the teacher" in ended.out
    assert "(random predictions: 0.50)" in ended.err  # half a nat for a number that is always the mean
    assert read_manifest(out).source["outputs"] == "regression"
    assert outputs_of(package.load(out)).name == "regression"
    assert vitcompress("check", out, "--max-drop", 1).code == 3
    ended = vitcompress("evaluate", out, "--data", images, "--num-workers", 0, "--checkpoint", number[-1], "--json")
    assert json.loads(ended.out)["r2"] == pytest.approx(accuracy["r2"], abs=1e-4)  # batches of another size


def test_five_more_on_the_logits_of_labels_is_seen(
    flags: Flags, flat: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    model, out = flags(3), tmp_path / "m.safetensors"
    words = ["--outputs", "multi_label", "--data", flat, "--steps", 0, "--share", 1, "--transforms", "none"]
    assert vitcompress("compress", *model, *words, *FAST, "--out", out).code == 0
    accuracy = report_of(out)["accuracy"]
    assert (accuracy["agreement"], accuracy["kl"], accuracy["mean_average_precision"]) == (100, 0, 100)
    up = flags(3, raised=5)
    config = {"architecture": ARCHITECTURE, "model_args": {}, "num_classes": 3}
    (tmp_path / "up").mkdir()
    for word in up[2:-2:2]:
        key, _, value = word.partition("=")
        config["model_args"][key] = json.loads(value)  # type: ignore[index]
    (tmp_path / "up" / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {}}))
    (tmp_path / "up" / "model.safetensors").write_bytes(Path(up[-1]).read_bytes())
    teacher = f"local-dir:{tmp_path / 'up'}"
    ended = vitcompress("evaluate", out, "--data", flat, "--num-workers", 0, "--teacher", teacher, "--json")
    assert ended.code == 0, ended.err
    moved = json.loads(ended.out)
    assert moved["agreement"] < 90
    assert moved["kl"] > 0.5


@pytest.mark.parametrize(
    ("outputs", "words", "message"),
    [
        ("regression", ["--loss", "labels=1"], "--loss labels: the outputs of vit_tiny_patch16_224 are numbers"),
        ("multi_label", ["--loss", "labels=1"], "--loss labels: the outputs of vit_tiny_patch16_224 are logits of ind"),
        ("multi_label", ["--loss", "features=1"], "--loss features: the outputs of vit_tiny"),
        ("regression", ["--temperature", "2"], "--temperature 2: the outputs of vit_tiny_patch16_224 are numbers"),
        ("regression", ["--max-drop", "1"], "--max-drop counts points of top-1, but the outputs"),
        ("multi_label", ["--target-drop", "1", "--share"], "--target-drop counts points of top-1, but the outputs"),
    ],
)
def test_options_of_classes_are_refused(
    outputs: str, words: list[str], message: str, flags: Flags, images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    words = [word for word in words if word != "--share"]
    given = ["--outputs", outputs, "--data", images, "--num-workers", 0, "--out", tmp_path / "m.safetensors"]
    ended = vitcompress("compress", *flags(3), *given, *words)
    assert (ended.code, message in ended.err) == (2, True), ended
    assert "labeled images" not in ended.err


def test_a_head_that_has_no_such_outputs_is_refused(number: list[str], vitcompress: Vitcompress) -> None:
    ended = vitcompress("plan", *number, "--outputs", "classes")
    assert (ended.code, "one output, which cannot be classes" in ended.err) == (2, True)
    ended = vitcompress("plan", ARCHITECTURE, *model_flags(num_classes=0), "--outputs", "multi_label")
    assert (ended.code, "its outputs are features" in ended.err) == (2, True)


def test_a_plan_tells_the_outputs(number: list[str], flags: Flags, vitcompress: Vitcompress) -> None:
    assert "numbers (regression)" in vitcompress("plan", *number).out
    words = ["plan", *flags(3), "--outputs", "multi_label", "--json"]
    assert json.loads(vitcompress(*words).out)["outputs"] == "multi_label"


@pytest.mark.thorough
@pytest.mark.parametrize("outputs", ["regression", "multi_label"])
def test_no_option_of_a_search_is_free(outputs: str, number: list[str], flat: Path, vitcompress: Vitcompress) -> None:
    words = ["--outputs", outputs, "--calibrate", flat, "--kinds", "narrow,share", "--json", "--quiet"]
    ended = vitcompress("plan", *number, *words)
    assert ended.code == 0, ended.err
    costs = [option["nats"] for option in json.loads(ended.out)]
    assert sum(cost > 0 for cost in costs) > len(costs) / 2  # rounding may hide a few


def test_a_teacher_of_another_kind_is_refused_and_one_that_tells_none_has_the_students(
    flags: Flags, flat: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    made = {}
    for outputs in ("multi_label", "regression"):
        made[outputs] = tmp_path / f"{outputs}.safetensors"
        words = ["--outputs", outputs, "--data", flat, "--steps", 1, *SHARED, *FAST, "--out", made[outputs]]
        ended = vitcompress("compress", *flags(3), *words, *flags(3, raised=1, teacher=True))
        assert ended.code == 0, ended.err
    given: list[object] = ["--data", flat, "--num-workers", 0]
    ended = vitcompress("evaluate", made["regression"], *given, "--teacher", made["multi_label"])
    assert (ended.code, "gives logits of independent labels" in ended.err) == (2, True), ended
    given += ["--teacher", made["regression"], "--dry-run"]
    assert vitcompress("compress", *flags(3), *given, "--outputs", "classes").code == 0  # said of both
    ended = vitcompress("compress", *flags(3), *given)
    assert (ended.code, "gives numbers (regression)" in ended.err) == (2, True), ended


def test_class_folders_make_a_new_head_of_classes(
    flags: Flags, images: Path, flat: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    mini = tmp_path / "mini.safetensors"
    words = ["--outputs", "multi_label", "--data", flat, "--steps", 0, *SHARED, *FAST, "--out", mini]
    assert vitcompress("compress", *flags(5), *words).code == 0
    train: list[object] = ["finetune", mini, *FAST[:-1], "--steps", 2]
    ended = vitcompress(*train, "--data", images, "--out", tmp_path / "headed.safetensors")
    assert ended.code == 0, ended.err
    report = report_of(tmp_path / "headed.safetensors")
    assert report["outputs"] == "classes"
    assert report["accuracy"]["student_top1"] is not None
    assert "outputs" not in read_manifest(tmp_path / "headed.safetensors").source
    same: list[object] = ["--teacher", mini, "--max-drop", 1]
    ended = vitcompress(*train, "--data", flat, *same, "--out", tmp_path / "same.safetensors")
    assert (ended.code, "--max-drop counts points of top-1" in ended.err) == (2, True), ended
    ended = vitcompress(*train, "--data", flat, *same[:2], "--out", tmp_path / "same.safetensors")
    assert ended.code == 0, ended.err
    assert report_of(tmp_path / "same.safetensors")["outputs"] == "multi_label"


@pytest.mark.thorough
def test_a_page_shows_the_images_whose_numbers_differ_most(
    number: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "m.safetensors", tmp_path / "p.html"
    assert vitcompress("compress", *number, "--data", flat, "--steps", 0, *SHARED, *FAST, "--out", out).code == 0
    kept: list[Examples] = []
    surest = Examples.surest

    def keeping(self: Examples) -> list[Example]:
        kept.append(self)
        return surest(self)

    monkeypatch.setattr(Examples, "surest", keeping)
    words = ["--html", page, "--data", flat, "--num-workers", 0, "--checkpoint", number[-1]]
    assert vitcompress("report", out, *words).code == 0
    errors = [abs(float(each.teacher.value) - float(each.student.value)) for each in surest(kept[0])]
    assert kept[0].count == len(errors) == 12
    assert errors == pytest.approx(sorted(errors, reverse=True), abs=1e-2)
    text = page.read_text(encoding="utf-8")
    assert "give different numbers" in text
    assert "class:" not in text


@pytest.mark.thorough
def test_an_export_to_the_hub_names_the_problem(
    flags: Flags, flat: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    out = tmp_path / "m.safetensors"
    words = ["--outputs", "regression", "--data", flat, "--steps", 0, *SHARED, *FAST, "--out", out]
    assert vitcompress("compress", *flags(3), *words).code == 0
    assert vitcompress("export", out, "--to", "hf", "--out", tmp_path / "hub").code == 0
    tree = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (tree["problem_type"], tree["vitcompress"]["outputs"]) == ("regression", "regression")
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag" not in card
    assert "| numbers | 3; outputs are a regression |" in card
