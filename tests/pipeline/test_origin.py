"""Fine-tune a model of timm, then compress the result: two commands."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import vitcompress as package
from tests.conftest import Vitcompress, draw_image
from tests.factories import tiny
from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.read import read_manifest
from vitcompress.report.model import Parent, from_json

FAST: tuple[object, ...] = ("--batch-size", 6, "--num-workers", 0, "--device", "cpu", "--quiet")


def test_a_model_of_timm_is_fine_tuned_and_then_compressed(
    teacher: Sequence[str], regrouped: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    tuned, mini = tmp_path / "tuned.safetensors", tmp_path / "mini.safetensors"
    words: list[object] = ["--mean", "0.4", "--crop-pct", "0.9", "--data", regrouped, "--steps", 2]
    ended = vitcompress("finetune", *teacher, *words, *FAST, "--out", tuned)
    assert ended.code == 0, ended.err
    report, model = from_json(json.loads(vitcompress("report", tuned, "--json").out)), package.load(tuned)
    assert report.lineage == (Parent(report.model, sha256_of(tiny().state_dict()), ""),)
    assert report.train.losses == {"labels": 1.0}
    assert report.size.student_params == report.size.teacher_params == sum(p.numel() for p in model.parameters())
    assert model.pretrained_cfg["label_names"] == ("blue", "green", "red")  # type: ignore[index]
    assert "made by" not in vitcompress("report", tuned).out

    assert vitcompress("plan", tuned, "--share", 2).code == 0
    ended = vitcompress("compress", tuned, "--data", regrouped, "--share", 2, "--steps", 1, *FAST, "--out", mini)
    assert ended.code == 0, ended.err
    manifest = read_manifest(mini)
    assert manifest.source["name"] == "file:tuned.safetensors"
    assert manifest.source_sha256 == sha256_of(model.state_dict())
    assert manifest.classes == ("blue", "green", "red")
    assert manifest.data_config == read_manifest(tuned).data_config
    assert manifest.data_config["mean"] == (0.4, 0.4, 0.4)
    assert (manifest.data_config["crop_pct"], manifest.lineage) == (0.9, ())

    ended = vitcompress("evaluate", mini, "--data", regrouped, "--num-workers", 0)
    assert (ended.code, "mini.safetensors was made from tuned.safetensors" in ended.err) == (0, True)
    words = ["--data", regrouped, "--num-workers", 0, "--json"]
    compared = json.loads(vitcompress("evaluate", mini, "--teacher", tuned, *words).out)
    assert compared["teacher_top1"] == json.loads(vitcompress("evaluate", tuned, *words).out)["student_top1"]


def test_the_student_of_a_file_starts_as_its_model(
    teacher: Sequence[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    """Nothing is shared and nothing is trained, so the outputs are those of the file."""
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    words: list[object] = ["--share", 1, "--transforms", "none", "--steps", 0, "--data", flat, *FAST]
    assert vitcompress("compress", *teacher, *words, "--store", "fp16", "--out", paths[0]).code == 0
    assert vitcompress("compress", paths[0], *words, "--out", paths[1]).code == 0
    first, second = map(package.load, paths)
    assert sha256_of(first.state_dict()) == sha256_of(second.state_dict()) == read_manifest(paths[1]).source_sha256


def test_a_kept_head_keeps_the_digest_of_the_model(
    teacher: Sequence[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    numbered = tmp_path / "numbered"
    for number, folder in enumerate(sorted((images / "train").iterdir())):
        for file in folder.iterdir():
            (numbered / str(number)).mkdir(parents=True, exist_ok=True)
            (numbered / str(number) / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "tuned.safetensors"
    ended = vitcompress("finetune", *teacher, "--data", numbered, "--steps", 1, *FAST, "--out", out)
    assert ended.code == 0, ended.err
    assert read_manifest(out).source_sha256 == sha256_of(tiny().state_dict())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--share", 2, "--transforms", "none"], "blocks share weights"),
        (["--share", 1, "--transforms", "heads,mlp"], r"blocks have transformations (heads, mlp)"),
        (["--share", 1, "--transforms", "none", "--width", 0.5], "blocks are narrow"),
        (["--share", 1, "--transforms", "none", "--adapter-rank", 4, "--no-matrices"], "layers have low rank"),
        (["--share", 1, "--transforms", "none", "--store", "int8"], "weights are rounded to int8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_compressed_already_is_refused(
    words: list[object], reason: str, teacher: Sequence[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    mini = tmp_path / "mini.safetensors"
    assert vitcompress("compress", *teacher, *words, "--steps", 0, "--data", flat, *FAST, "--out", mini).code == 0
    for command in (["plan", mini], ["compress", mini, "--data", flat, "--out", tmp_path / "again.safetensors"]):
        ended = vitcompress(*command, "--share", 2)
        assert ended.code == 2
        assert ended.err.startswith(f"Error: MODEL {mini} is compressed already: {reason}.")


def test_mistakes_with_files(
    mini: Path, weights: Path, flat: Path, tmp_path: Path, vitcompress: Vitcompress, teacher: Sequence[str]
) -> None:
    plain = tmp_path / "plain.safetensors"
    words: list[object] = ["--share", 1, "--transforms", "none", "--steps", 0, "--data", flat, *FAST]
    assert vitcompress("compress", *teacher, *words, "--out", plain).code == 0
    before = hashlib.sha256(plain.read_bytes()).hexdigest()
    for more, message in (
        ([plain, "--checkpoint", weights], "is a file with its own weights and sizes"),
        ([plain, "--model-arg", "num_classes=3"], "is a file with its own weights and sizes"),
        ([weights], "name their architecture: MODEL --checkpoint FILE"),
        ([tmp_path / "gone.safetensors"], "does not exist"),
    ):
        ended = vitcompress("plan", *more, "--share", 2)
        assert ended.code == 2, message
        assert message in ended.err.replace("\n", " ")
    ended = vitcompress("compress", plain, *words, "--out", plain)
    assert (ended.code, f"--out {plain} would overwrite MODEL." in ended.err) == (2, True)
    assert hashlib.sha256(plain.read_bytes()).hexdigest() == before
    ended = vitcompress(
        "finetune", mini, "--data", flat, "--mean", "0.5", "--steps", 1, *FAST, "--out", tmp_path / "a.safetensors"
    )
    assert (ended.code, "--mean cannot be used with finetune" in ended.err) == (2, True)


def test_a_damaged_file_is_no_model(
    teacher: Sequence[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    plain, out = tmp_path / "plain.safetensors", tmp_path / "out.safetensors"
    words: list[object] = ["--steps", 0, "--data", flat, *FAST]
    assert vitcompress("compress", *teacher, "--share", 1, "--transforms", "none", *words, "--out", plain).code == 0
    content = bytearray(plain.read_bytes())
    content[-5] ^= 1
    plain.write_bytes(bytes(content))
    ended = vitcompress("compress", plain, "--share", 2, *words, "--out", out)
    assert (ended.code, out.exists()) == (2, False)
    assert "plain.safetensors" in ended.err


def test_the_built_in_model_is_fine_tuned_as_others_are(tmp_path: Path, vitcompress: Vitcompress) -> None:
    """Its own defaults, Muon and fading among them, are for sharing."""
    for number in range(4):
        draw_image(tmp_path / "data" / ("a" if number % 2 else "b") / f"{number}.png", number)
    out = tmp_path / "tuned.safetensors"
    ended = vitcompress("finetune", "fashion_vit", "--data", tmp_path / "data", "--steps", 1, *FAST, "--out", out)
    assert ended.code == 0, ended.err
    assert read_manifest(out).recipe["distill"]["optimizer"] == "adamw"
    assert package.load(out)(torch.randn(1, 1, 28, 28)).shape == (1, 2)
