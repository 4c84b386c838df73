"""Reports are read as they were written, and implausible ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.report.samples import ACCURACY, FULL, REPORT, shown
from vitcompress.errors import ArtifactError
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import from_json, to_json


def test_json_is_the_report() -> None:
    tree = json.loads(json.dumps(to_json(REPORT)))
    assert from_json(tree) == REPORT
    assert set(tree) == {
        "schema_version", "model", "family", "groups", "transforms", "size", "accuracy", "speed", "train", "data",
        "versions", "command", "notes", "before", "lineage", "store", "baselines", "made_of", "why",
        "preprocessing", "outputs", "seconds",
    }  # fmt: skip
    assert set(tree["size"]) == {
        "teacher_params", "student_params", "params_ratio", "teacher_bytes", "student_bytes", "bytes_ratio",
        "teacher_macs", "student_macs", "macs_ratio",
    }  # fmt: skip


def test_another_schema_is_refused() -> None:
    with pytest.raises(ArtifactError, match="schema 2"):
        from_json({**to_json(REPORT), "schema_version": 2, "accuracies": []})


def test_a_report_from_before_macs_were_counted_is_read_and_calls_them_unknown() -> None:
    tree = to_json(REPORT)
    for name in ("teacher_macs", "student_macs", "macs_ratio"):
        del tree["size"][name]
    old = from_json(tree)
    assert old.size == replace(REPORT.size, teacher_macs=None, student_macs=None, macs_ratio=None)
    assert "| MACs per image | unknown | unknown |  |" in to_markdown(old)
    assert shown(old).count("unknown") == 2


def changed(where: str, value: object) -> dict[str, Any]:
    """A report with a value of someone else's: `size.student_bytes`, `made_of.0.blocks`."""
    tree: dict[str, Any] = json.loads(json.dumps(to_json(FULL)))
    *way, last = where.split(".")
    holder: Any = tree
    for name in way:
        holder = holder[int(name)] if isinstance(holder, list) else holder[name]
    holder[int(last) if isinstance(holder, list) else last] = value
    return tree


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("groups", []), ("groups", [0]), ("groups", [1] * 600), ("made_of.0.blocks", ["a", "b"]),
        ("made_of.0.blocks", ["blocks.\u00b2"]), ("size.student_bytes", 10**400), ("size.student_bytes", 0),
        ("size.student_bytes", -5), ("size.macs_ratio", 0.0), ("size.params_ratio", float("nan")),
        ("size.params_ratio", float("inf")), ("speed.teacher_ms", {"1": 0.0, "32": 1.0}),
        ("speed.teacher_ms", {"x": 1.0}), ("accuracy.num_images", 0), ("accuracy.student_top1", 1e308),
        ("accuracy.classes.0.num_images", 0), ("baselines.0.bytes", 0), ("model", "x" * 100_000),
        ("train.loss_curve", [{"step": 1e308, "loss": 1e308}] * 2), ("train.loss_curve", [{"step": 1.0}] * 1000),
        ("baselines", [to_json(FULL)["baselines"][0]] * 100),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_a_report_that_cannot_be_is_refused(where: str, value: object) -> None:
    assert from_json(changed("model", "x")).model == "x"
    with pytest.raises(ArtifactError, match=f"Implausible report: {where.split('.')[0]}"):
        from_json(changed(where, value))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("speed.student_ms", {"1": 1.0}), ("accuracy.classes.0.student_hits", 5),
        ("accuracy.classes.0.teacher_hits", 5), ("groups", [300, 300]), ("made_of.0.widths.hidden", 10**400),
        ("made_of.0.ranks", {"attn.qkv": 10**400}), ("notes", ["x"] * 5000), ("accuracy.kl", 10**400),
        ("train.loss_curve", [dict.fromkeys(map(str, range(33)), 1.0)]), ("added_later", 1),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_fields_that_contradict_each_other_or_have_no_bounds_of_their_own_are_refused(
    where: str, value: object
) -> None:
    with pytest.raises(ArtifactError, match=f"Implausible report: {where.split('.')[0]}"):
        from_json(changed(where, value))


def test_a_report_is_never_refused_when_it_is_made() -> None:
    size = replace(REPORT.size, params_ratio=float("nan"), student_bytes=0)
    report = replace(REPORT, size=size, groups=(), accuracy=replace(ACCURACY, kl=float("inf"), num_images=-1))
    assert "NaN" in json.dumps(to_json(report))
    assert shown(report)
    with pytest.raises(ArtifactError, match="Implausible report"):
        from_json(to_json(report))
