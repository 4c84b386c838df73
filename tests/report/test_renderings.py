"""Terminal and Markdown show the same rows and sentences."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from tests.report.samples import FULL, REPORT, UNLABELLED, shown
from vitcompress.families.widths import Widths
from vitcompress.measure.results import Baseline
from vitcompress.plans.model import Group
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import from_json, to_json
from vitcompress.report.rows import size_rows


def test_terminal_and_markdown_show_the_same_numbers() -> None:
    for text in (shown(REPORT), to_markdown(REPORT)):
        for number in (
            "86,567,656",
            "22,953,064",
            "3.77× fewer",
            "17.56 G",
            "17.71 G",
            "1.01× more",
            "86.00 %",
            "84.50 %",
            "-1.50 points",
            "92.00 %",
            "1.20×",
        ):
            assert number in text
        assert "-0.20 to 3.20 points" in text
        assert "groups of 5+5+2" in text
        assert "smaller, not faster" in text
        assert "3 unreadable images" in text


def test_without_labels_nothing_is_called_accuracy() -> None:
    for text in (shown(UNLABELLED), to_markdown(UNLABELLED)):
        assert "top-1" not in text
        assert "88.00 %" in text
        assert "agreement with the teacher, not accuracy" in text
        assert "Converted without training." in text


def test_markdown_is_a_table() -> None:
    lines = to_markdown(REPORT).splitlines()
    assert lines[0] == "## deit_base_patch16_224: 12 blocks in groups of 5+5+2"
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5}
    assert REPORT.command in lines


def test_the_report_says_what_layers_are_made_of() -> None:
    residual = Group(("blocks.0", "blocks.2"), ("attn.qkv.weight",), {"attn.qkv": 4}, ("attn.qkv",))
    product = Group(("blocks.1",), (), {"attn.qkv": 8, "mlp.fc1": 8}, widths=Widths(hidden=48, qk=16, v=12))
    report = replace(REPORT, groups=(2, 1), made_of=(residual, product))
    assert from_json(json.loads(json.dumps(to_json(report)))) == report
    for text in (shown(report), to_markdown(report)):
        assert "3 blocks in groups of 2+1, taken in turn" in text
        assert "2 of 3 blocks: residuals of rank 4 with a basis of the group added to the matrices of attn.qkv." in text
        assert "1 of 3 blocks: products of rank 8 in place of the matrices of attn.qkv, mlp.fc1." in text
        assert "narrower: 48 hidden neurons; per head, 16 channels for queries and keys and 12 for values" in text
    assert "12 blocks that share nothing" in to_markdown(replace(REPORT, groups=(1,) * 12))
    tree = to_json(REPORT)
    del tree["made_of"]  # a report from before
    assert from_json(tree) == REPORT


def test_a_report_says_so_where_the_teacher_in_fewer_bits_is_better() -> None:
    assert REPORT.accuracy is not None
    better = Baseline("teacher int8", 10, REPORT.size.student_bytes - 1, 99.0, -1.0, None, None)
    worse = replace(better, name="teacher int4", top1=REPORT.accuracy.student_top1 - 1)  # type: ignore[operator]
    large = replace(better, name="teacher fp16", bytes=REPORT.size.student_bytes)
    shown = to_markdown(replace(REPORT, baselines=(large, better, worse)))
    assert "- The teacher int8, without training, is smaller than this student" in shown
    assert "has a better top-1 (99.00 % against" in shown
    assert "without training, is smaller" not in to_markdown(replace(REPORT, baselines=(large, worse)))


def test_what_is_larger_is_not_called_smaller() -> None:
    size = replace(REPORT.size, params_ratio=0.99, bytes_ratio=0.5)
    assert [row[3] for row in size_rows(size)][:2] == ["1.01× more", "2.00× larger"]


def test_names_of_a_report_are_no_markup() -> None:
    name = "[/bold][link=https://x.example]`a`[/link]![i](https://x.example)"
    report = replace(FULL, model=name, baselines=(replace(FULL.baselines[0], name=name),))
    assert shown(report).count("[/bold][link=") == 3  # the model, the baseline in the table and in the first sentence
    written = to_markdown(report)
    assert r"\[/bold\]\[link=https://x.example\]\`a\`" in written
    assert re.search(r"(?<!\\)[\[!]", written) is None
