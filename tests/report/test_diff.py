"""What differs between two files."""

from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from tests.report.samples import RESULT, TRAINED
from vitcompress.plans.model import Group
from vitcompress.report.diff import differences, print_differences


def test_what_changed_is_found_and_nothing_else() -> None:
    assert differences(RESULT, RESULT) == []
    other = replace(
        RESULT, recipe={"plan": {"share": 6}, "gates": {"max_drop": 1.0}},
        report=replace(TRAINED, groups=(6, 6), accuracy=replace(TRAINED.accuracy, student_top1=85.0)),  # type: ignore[type-var]
    )  # fmt: skip
    assert [tuple(row) for row in differences(RESULT, other)] == [
        ("plan", "sharing", "12 blocks in groups of 5+5+2", "12 blocks in 2 groups of 6"),
        ("recipe", "plan.share", 5, 6),
        ("numbers", "accuracy.student_top1", 84.5, 85.0),
    ]


def test_a_diff_tells_what_is_alike_once() -> None:
    plain = tuple(Group((f"blocks.{i}", f"blocks.{i + 1}"), ("attn.qkv.weight",)) for i in range(0, 6, 2))
    more = tuple(replace(group, shared=("attn.qkv.weight", "mlp.fc1.weight")) for group in plain)
    first = replace(RESULT, report=replace(TRAINED, made_of=plain, baselines=()))
    second = replace(RESULT, report=replace(TRAINED, made_of=more))
    found = differences(first, second)
    console = Console(width=200, file=io.StringIO())
    print_differences(found, ("a", "b"), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("attn.qkv.weight") == 2  # a row of both files
    assert "groups of blocks.0, blocks.2, blocks.4" in shown
    assert re.findall(r"baselines\S* +│ not measured +│ measured", shown) != []
    assert shown.count("baselines") == 1
    assert len(found) > len([line for line in shown.splitlines() if line.startswith("│")])
