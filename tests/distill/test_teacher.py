"""Other teachers, and options that only interact in a full run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vitcompress
from tests.factories import ARGS, save_as_timm_does, tiny
from vitcompress.distill.teacher import adapt_inputs, find_teacher
from vitcompress.errors import CheckpointError, RecipeError, VitcompressError
from vitcompress.recipe import TeacherRecipe
from vitcompress.recipe.compose import build
from vitcompress.report.model import Report

NAME = "vit_tiny_patch16_224"
SEEN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OWN = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def pairs(**changed: Any) -> list[str]:
    return [f"{key}={value}" for key, value in {**ARGS, **changed}.items()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of three models, and labelled images in `data/`."""
    root = tmp_path_factory.mktemp("files")
    save_file(tiny().state_dict(), root / "tiny.safetensors")
    save_file(tiny(depth=8, embed_dim=48, num_heads=6).state_dict(), root / "wide.safetensors")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), root / "resnet.safetensors")
    for number in range(20):
        path = root / "data" / f"{number % 5}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def compress(files: Path, out: Path, **flags: Any) -> tuple[Report, torch.nn.Module]:
    base = {
        "model": NAME, "model_arg": pairs(), "checkpoint": files / "tiny.safetensors", "data": files / "data",
        "steps": 3, "batch_size": 6, "num_workers": 0, "device": "cpu", "share": 2,
    }  # fmt: skip
    report = vitcompress.compress(build({**base, **flags}), out / "mini.safetensors")
    return report, vitcompress.load(out / "mini.safetensors")


def wide(files: Path) -> dict[str, Any]:
    return {
        "teacher": NAME, "teacher_arg": pairs(depth=8, embed_dim=48, num_heads=6),
        "teacher_checkpoint": files / "wide.safetensors",
    }  # fmt: skip


def test_a_normalisation_is_exchanged_exactly() -> None:
    pixels = torch.rand(2, 3, 32, 32)

    def normal(config: dict[str, Any]) -> torch.Tensor:
        mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
        return (pixels - mean) / std

    teacher = tiny()
    expected = teacher(normal(OWN))
    adapt_inputs(teacher, OWN, SEEN, None)
    torch.testing.assert_close(teacher(normal(SEEN)), expected)


def test_views_of_another_size_are_resized_as_views_are_made() -> None:
    teacher = tiny(img_size=48)
    x = torch.rand(2, 3, 32, 32)
    expected = teacher(torch.nn.functional.interpolate(x, (48, 48), mode="bicubic", antialias=True))
    adapt_inputs(teacher, SEEN, SEEN, (48, 48))
    assert torch.equal(teacher(x), expected)


def test_equal_inputs_are_left_alone() -> None:
    teacher = tiny()
    adapt_inputs(teacher, SEEN, SEEN, None)
    assert not teacher._forward_pre_hooks


def test_the_source_teaches_where_no_teacher_is_named(files: Path, tmp_path: Path) -> None:
    report, _ = compress(files, tmp_path)
    assert report.train.teacher == NAME
    assert report.train.losses == {"logits": 1.0, "hidden": 1.0, "hidden_relation": 0.1, "attention": 1.0}
    assert not any("learned from" in note for note in report.notes)


def test_a_wider_and_deeper_teacher_gives_relations(files: Path, tmp_path: Path) -> None:
    report, _ = compress(files, tmp_path, **wide(files), loss=["logits=1", "attention=1", "hidden_relation=0.1"])
    assert set(report.train.losses) == {"logits", "attention", "hidden_relation"}
    assert all(point["attention"] > 0 for point in report.train.loss_curve)
    assert any(note.startswith(f"The student learned from {NAME}") for note in report.notes)


def test_a_convolutional_teacher_gives_logits_and_the_report_says_so(files: Path, tmp_path: Path) -> None:
    report, _ = compress(
        files, tmp_path, teacher="test_resnet", teacher_arg=["num_classes=5"],
        teacher_checkpoint=files / "resnet.safetensors",
    )  # fmt: skip
    assert report.train.losses == {"logits": 1.0}
    assert any("it gives logits only, without the losses hidden" in note for note in report.notes)


def test_an_artifact_teaches(files: Path, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    compress(files, tmp_path / "first", steps=0)
    teacher = tmp_path / "first" / "mini.safetensors"
    report, _ = compress(files, tmp_path, teacher=str(teacher), steps=1, lr=1e-12)
    assert report.train.teacher == "mini.safetensors"
    assert report.train.loss_curve[0]["loss"] == pytest.approx(0, abs=1e-5)  # the student starts as its teacher


def test_teachers_that_cannot_be_told_before_any_weight_is_loaded(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitcompress.pipeline.plan.load_weights", lambda source: pytest.fail("weights were loaded"))
    with pytest.raises(VitcompressError) as caught:
        compress(files, tmp_path, **wide(files), drop_path=0.5, auto_augment="nonsense")
    assert "--loss hidden" in str(caught.value)
    with pytest.raises(VitcompressError) as caught:
        compress(files, tmp_path, teacher="no_such_model", auto_augment="nonsense")
    assert "--teacher no_such_model is unknown." in str(caught.value)
    assert "--auto-augment nonsense" in str(caught.value)
    with pytest.raises(VitcompressError, match=r"--layers 9: 9 goes past the student's last block, 3\."):
        compress(files, tmp_path, layers="9")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"teacher": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
        ({"teacher": "a.safetensors", "teacher_arg": {"depth": 2}}, "is a file with its own weights and sizes"),
        ({"teacher": NAME, "teacher_checkpoint": "nowhere.pth"}, "--teacher-checkpoint nowhere.pth does not exist."),
        ({"teacher": NAME, "teacher_arg": {"nonsense": 1}}, "nonsense=1"),
        ({"teacher": NAME, "teacher_arg": {"pretrained": 1}}, "--teacher-arg pretrained"),
    ],
)
def test_teachers_that_there_are_not(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(VitcompressError) as caught:
        find_teacher(TeacherRecipe(**recipe))
    assert message in str(caught.value)


def test_weights_of_another_teacher(files: Path) -> None:
    found = find_teacher(TeacherRecipe(NAME, files / "wide.safetensors", dict(ARGS)))
    with pytest.raises(CheckpointError, match=r"--teacher-checkpoint .*does not fit") as caught:
        found.load()
    assert "--teacher-arg" in caught.value.hint


def test_labels_need_labelled_images(files: Path, tmp_path: Path) -> None:
    with pytest.raises(VitcompressError, match="--loss labels needs labeled images"):
        compress(files, tmp_path, data=files / "data" / "0", loss=["labels=1"])


EVERYTHING = {
    "loss": ["logits=1", "hidden=1", "attention=1", "hidden_relation=0.1", "labels=0.5"],
    "label_smoothing": 0.1, "max_relation_tokens": 7, "relation_heads": 2, "mixup": 0.8, "cutmix": 1.0,
    "auto_augment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "repeats": 2, "drop_path": 0.3, "ema": 0.9,
}  # fmt: skip


@pytest.mark.thorough
def test_everything_at_once_is_the_same_for_any_number_of_workers_and_checkpointed(files: Path, tmp_path: Path) -> None:
    runs = []
    for workers in (0, 2):
        report, student = compress(files, tmp_path, **EVERYTHING, num_workers=workers, grad_checkpointing=workers > 0)
        runs.append((report.train.loss_curve, student.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert set(runs[0][0][0]) == {"step", "lr", "loss", "logits", "hidden", "attention", "hidden_relation", "labels"}
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_a_teacher_whose_config_is_on_another_scale_is_refused(tmp_path: Path) -> None:
    config = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "input_size": [3, 32, 32]}
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict(), pretrained_cfg=config)
    with pytest.raises(RecipeError, match=r"^--teacher local-dir:\S+: mean in its config is 123\.675") as caught:
        find_teacher(TeacherRecipe(f"local-dir:{folder}"))
    assert caught.value.hint == "Correct the config of the teacher."
