"""Models without classes learn and are measured by features, which are not called accuracy."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import vitcompress as package
from tests.conftest import ARCHITECTURE, Vitcompress, model_flags
from tests.factories import tiny
from tests.measure.samples import Fixed, evaluate, numbered
from vitcompress.distill.losses import feature_mse

FAST = ("--num-workers", 0, "--device", "cpu", "--quiet", "--batch-size", 6, "--share", 2)


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """MODEL and the flags that make it `tiny(num_classes=0)`."""
    path = tmp_path_factory.mktemp("headless") / "weights.safetensors"
    save_file(tiny(num_classes=0).state_dict(), path)
    return [ARCHITECTURE, *model_flags(num_classes=0), "--checkpoint", str(path)]


def test_the_loss_is_that_of_normalised_features() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    za, zb = ((x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() for x in (a, b))
    assert feature_mse(a.float(), b.float()).item() == pytest.approx(((za - zb) ** 2).mean().item(), rel=1e-5)
    assert feature_mse(a, a).item() == 0
    assert feature_mse(a.float(), (3 * a + 1).float()).item() == pytest.approx(0, abs=1e-4)


def test_the_cosine_is_a_mean_over_images_and_nothing_is_called_accuracy() -> None:
    student, teacher = torch.tensor([[1.0, 0], [1, 1], [0, -2]]), torch.tensor([[2.0, 0], [1, 0], [0, 1]])
    found = evaluate(Fixed(student), Fixed(teacher), numbered([0] * 3, (2, 1)))
    assert found.feature_cosine == pytest.approx((1 + 0.5**0.5 - 1) / 3, abs=1e-6)
    assert (found.student_top1, found.teacher_top1, found.top1_drop, found.agreement, found.kl) == (None,) * 5
    assert found.num_images == 3


def test_tokens_that_are_not_pooled_count_as_one_image() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 7, 5), torch.randn(4, 7, 5)
    found = evaluate(Fixed(student), Fixed(teacher), numbered([-1] * 4, [4]))
    expected = F.cosine_similarity(student, teacher, dim=-1).mean().item()
    assert found.feature_cosine == pytest.approx(expected, abs=1e-6)


@pytest.mark.thorough
def test_a_model_without_classes_learns_and_is_measured_by_features(
    headless: list[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    out = tmp_path / "mini.safetensors"
    ended = vitcompress("compress", *headless, "--data", images, "--steps", 20, "--start", "first", *FAST, "--out", out)
    assert ended.code == 0, ended.err
    assert "cosine similarity of features" in ended.out
    for word in ("top-1", "agreement", "accuracy"):
        assert word not in ended.out
    report = json.loads((tmp_path / "mini.report.json").read_text(encoding="utf-8"))
    assert report["train"]["losses"] == {"features": 1.0, "hidden": 1.0, "hidden_relation": 0.1, "attention": 1.0}
    assert 0.5 < report["accuracy"]["feature_cosine"] <= 1
    curve = report["train"]["loss_curve"]
    assert curve[-1]["features"] < curve[0]["features"]
    assert package.load(out)(torch.randn(1, 3, 32, 32)).shape == (1, 24)

    weights = headless[-1]
    ended = vitcompress("evaluate", out, "--data", images, "--checkpoint", weights, "--num-workers", 0, "--json")
    assert json.loads(ended.out)["feature_cosine"] == report["accuracy"]["feature_cosine"]
    assert vitcompress("check", out, "--max-drop", 1).code == 3


def test_share_one_without_training_gives_the_teachers_features(
    headless: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    words = ["--share", 1, "--steps", 0, "--num-workers", 0, "--quiet", "--out", tmp_path / "one.safetensors"]
    assert vitcompress("compress", *headless, "--data", flat, *words).code == 0
    report = json.loads((tmp_path / "one.report.json").read_text(encoding="utf-8"))
    assert report["accuracy"]["feature_cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("loss", ["logits", "labels"])
def test_losses_of_classes_are_refused(
    loss: str, headless: list[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    words = ["--data", images, "--loss", f"{loss}=1", *FAST, "--out", tmp_path / "mini.safetensors"]
    ended = vitcompress("compress", *headless, *words)
    assert ended.code == 2
    assert f"--loss {loss}: {ARCHITECTURE} has no classes; its outputs are features." in ended.err
    assert "--loss features=1" in ended.err


def test_features_cannot_be_evaluated_without_the_teacher(
    headless: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress, no_network: None
) -> None:
    out = tmp_path / "mini.safetensors"
    assert vitcompress("compress", *headless, "--data", flat, "--steps", 0, *FAST, "--out", out).code == 0
    ended = vitcompress("evaluate", out, "--data", flat, "--num-workers", 0)
    assert ended.code == 2
    assert "--checkpoint" in ended.err


@pytest.mark.thorough
def test_a_model_without_classes_gets_a_head_from_labels_and_none_without(
    headless: list[str], images: Path, flat: Path, tmp_path: Path, vitcompress: Vitcompress, no_network: None
) -> None:
    mini = tmp_path / "mini.safetensors"
    assert vitcompress("compress", *headless, "--data", flat, "--steps", 0, *FAST, "--out", mini).code == 0
    words = ["finetune", mini, *FAST[:-2], "--steps", 2]
    assert vitcompress(*words, "--data", images, "--out", tmp_path / "headed.safetensors").code == 0
    assert package.load(tmp_path / "headed.safetensors")(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    ended = vitcompress(*words, "--data", flat, "--out", tmp_path / "none.safetensors")
    assert ended.code == 2  # its teacher's weights cannot be had
    same = ["--teacher", headless[0], "--teacher-checkpoint", headless[-1]]
    same += [word.replace("--model-arg", "--teacher-arg") for word in headless[1:-2]]
    ended = vitcompress(*words, "--data", flat, *same, "--out", tmp_path / "same.safetensors")
    assert ended.code == 0, ended.err
    assert "cosine similarity of features" in ended.out
