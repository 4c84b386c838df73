"""Stores, end to end: what is measured is what is stored, next to the teacher in fewer bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import vitcompress as package
from tests.conftest import Vitcompress
from tests.report import samples
from tests.report.samples import REPORT, UNLABELLED, shown
from vitcompress.artifact.read import read_manifest
from vitcompress.measure.baselines import BASELINES
from vitcompress.pipeline import plan as pipeline
from vitcompress.recipe import ModelRecipe, PlanRecipe
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import Report, from_json, to_json
from vitcompress.report.terminal import print_plan

CONVERT = ("--steps", 0, "--num-workers", 0, "--device", "cpu", "--quiet")


def compress(vitcompress: Vitcompress, out: Path, *words: object) -> Report:
    assert vitcompress("compress", *words, *CONVERT, "--out", out).code == 0
    return from_json(read_manifest(out).report)


def test_the_teacher_is_measured_in_fewer_bits(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], images: Path
) -> None:
    """A student that is its teacher equals the int8 baseline in int8."""
    words = [*teacher, "--data", images, "--share", 1, "--transforms", "none"]
    report = compress(vitcompress, tmp_path / "m.safetensors", *words, "--store", "int8")
    rows = {row.name: row for row in report.baselines}
    assert list(rows) == [f"teacher {store}" for store in BASELINES]
    assert report.accuracy is not None
    assert rows["teacher int8"].top1 == report.accuracy.student_top1
    assert rows["teacher int8"].top1_drop == report.accuracy.top1_drop
    assert (rows["teacher int8"].params, rows["teacher int8"].bytes) == (
        report.size.teacher_params, report.size.student_bytes,
    )  # fmt: skip
    assert rows["teacher fp16"].bytes * 2 == report.size.teacher_bytes
    assert rows["teacher int4"].bytes < rows["teacher int8"].bytes < rows["teacher fp16"].bytes
    assert all(row.agreement is None for row in report.baselines)


@pytest.mark.thorough
def test_without_labels_it_is_agreement(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], flat: Path
) -> None:
    report = compress(vitcompress, tmp_path / "m.safetensors", *teacher, "--val-data", flat)
    assert len(report.baselines) == len(BASELINES)
    assert all(row.top1 is None and row.agreement is not None for row in report.baselines)


@pytest.mark.thorough
def test_without_images_or_wish_there_are_none(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], images: Path
) -> None:
    assert compress(vitcompress, tmp_path / "a.safetensors", *teacher, "--start", "first").baselines == ()
    words = ["--data", images, "--no-baselines"]
    assert compress(vitcompress, tmp_path / "b.safetensors", *teacher, *words).baselines == ()


def test_old_reports_without_the_fields_are_still_read() -> None:
    tree = to_json(REPORT)
    del tree["store"], tree["baselines"]
    assert from_json(tree) == REPORT
    report = replace(REPORT, baselines=samples.BASELINES)
    assert from_json(json.loads(json.dumps(to_json(report)))) == report


def test_the_student_stands_beside_its_teacher_in_fewer_bits() -> None:
    report = replace(REPORT, store="int8", baselines=samples.BASELINES)
    for text in (shown(report), to_markdown(report)):
        for found in ("student int8", "teacher fp16", "teacher int8", "85.75 %", "-0.25 points", "87.10 MB"):
            assert found in text
    lines = to_markdown(report).splitlines()
    assert "| student int8 | 22,953,064 | 91.81 MB | 84.50 % | -1.50 points |" in lines
    assert "student int8" not in shown(REPORT) + to_markdown(REPORT)
    assert lines == [line for line in lines if line.count("|") in (0, 5, 6)]


def test_without_labels_the_table_says_agreement() -> None:
    rows = tuple(replace(row, top1=None, top1_drop=None, agreement=97.5) for row in samples.BASELINES)
    text = to_markdown(replace(UNLABELLED, baselines=rows))
    assert "|  | parameters | tensors | agreement with the teacher | change |" in text
    assert "top-1" not in text


# --- stores on the command line


@pytest.mark.broad
@pytest.mark.parametrize("store", ["fp16", "bf16", "int8", "int4"])
def test_plan_tells_the_bytes_of_the_file(
    store: str, tmp_path: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    words = ["--share", 3, "--store", store]
    report = compress(vitcompress, tmp_path / "m.safetensors", *teacher, *words, "--start", "first")
    planned = json.loads(vitcompress("plan", *teacher, *words, "--json").out)
    assert planned["size"] == to_json(report.size)
    assert read_manifest(tmp_path / "m.safetensors").store == report.store == store
    assert report.size.bytes_ratio > report.size.params_ratio


@pytest.mark.thorough
def test_training_may_end_in_the_stored_bits(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], images: Path
) -> None:
    """The last of four steps, or none: the same seed, other tensors."""
    words = ["compress", *teacher, "--data", images, "--steps", 4, "--batch-size", 4, "--num-workers", 0]
    words += ["--device", "cpu", "--quiet", "--no-baselines", "--store", "int4", "--fade", "0.9", "--optimizer", "muon"]
    found = []
    for name, fraction in (("a", 0), ("b", 0.5), ("c", 0.5)):
        out = tmp_path / f"{name}.safetensors"
        assert vitcompress(*words, "--qat-fraction", fraction, "--out", out).code == 0
        found.append({n: t.sum().item() for n, t in package.load(out).state_dict().items()})
    assert found[0] != found[1] == found[2]


@pytest.mark.thorough
def test_a_finetuned_file_is_stored_as_its_parent_unless_told(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], images: Path
) -> None:
    compress(vitcompress, tmp_path / "m.safetensors", *teacher, "--store", "int8")
    words = ["finetune", tmp_path / "m.safetensors", "--data", images, "--steps", 1, *CONVERT[2:], "--batch-size", 4]
    for flags, store in (([], "int8"), (["--qat-fraction", 1], "int8"), (["--store", "fp32"], "fp32")):
        out = tmp_path / f"{store}-{len(flags)}.safetensors"
        ended = vitcompress(*words, *flags, "--out", out)
        assert ended.code == 0, ended.err
        manifest = read_manifest(out)
        assert (manifest.store, manifest.report["store"]) == (store, store)
        assert package.load(out, keep_quantized=True).num_classes == 5


MISTAKES: list[tuple[list[object], list[str]]] = [
    (["--qat-fraction", 0.5], ["--qat-fraction 0.5: --store source quantizes nothing", "--store int8 or int4"]),
    (["--qat-fraction", 0.5, "--store", "bf16"], ["--store bf16 quantizes nothing"]),
    (
        ["--qat-fraction", 0.5, "--store", "int8"],
        ["--steps 0 trains nothing", "Give --steps N, or remove --qat-fraction"],
    ),
    (["--qat-fraction", 1.5, "--store", "int8"], ["--qat-fraction 1.5"]),
    (["--store", "int3"], ["--store int3"]),
]


@pytest.mark.broad
@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=lambda value: " ".join(map(str, value)))
def test_a_store_that_cannot_be(
    words: list[object], named: list[str], tmp_path: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    for more in (["--out", tmp_path / "m.safetensors"], ["--dry-run"]):
        ended = vitcompress("compress", *teacher, "--steps", 0, *words, *more)
        assert ended.code == 2
        assert all(text in ended.err for text in named), ended.err
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_store_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    planned = pipeline.plan(ModelRecipe("deit_tiny"), PlanRecipe(share=1, transforms=()), store="int8")
    print_plan(planned, "deit_tiny", Console())
    assert "5.87 MB" in capsys.readouterr().out
    assert planned.size.student_bytes == 5_874_672
