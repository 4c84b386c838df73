import io
import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from vitcompress.distill.log import TrainLog
from vitcompress.errors import ArtifactError
from vitcompress.families.widths import Widths
from vitcompress.measure.results import Accuracy, Baseline, ClassHits, Speed
from vitcompress.plans.model import Group, Size
from vitcompress.recipe import GateRecipe
from vitcompress.report.gates import missed_gates
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import Parent, Report, to_json
from vitcompress.report.picture import Point, alt_text, draw_sizes, points_of, to_svg
from vitcompress.report.private import without_places
from vitcompress.report.reading import from_json
from vitcompress.report.rows import size_rows
from vitcompress.report.terminal import print_report

ACCURACY = Accuracy("val", 400, 3, 86.0, 84.5, 97.25, 96.0, 1.5, (-0.2, 3.2), 92.0, 0.21)
REPORT = Report(
    schema_version=1,
    model="deit_base_patch16_224",
    family="vit",
    groups=(5, 5, 2),
    transforms=("heads", "mlp"),
    size=Size(86_567_656, 22_953_064, 3.7715, 346_270_624, 91_812_256, 3.7715, 17_563_828_224, 17_714_209_152, 0.9915),
    accuracy=ACCURACY,
    speed=Speed({"1": 10.0, "32": 100.0}, {"1": 12.0, "32": 110.0}, 2, "cpu"),
    train=TrainLog(500, 64_000, 3, 120.0, 533.3, ({"step": 1, "lr": 1e-3, "loss": 2.0, "logits": 2.0},)),
    data="train",
    versions={"torch": "2.15.0"},
    command="vitcompress compress deit_base --share 5 --out mini.safetensors",
    notes=("Sharing makes a model smaller, not faster: every block is still computed.",),
)
UNLABELLED = replace(
    REPORT, accuracy=Accuracy("flat", 9, 0, None, None, None, None, None, None, 88.0, 0.3), speed=None, train=TrainLog()
)


def shown(report: Report) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    print_report(report, console)
    return console.export_text()


def test_json_is_the_report() -> None:
    tree = json.loads(json.dumps(to_json(REPORT)))
    assert from_json(tree) == REPORT
    assert set(tree) == {
        "schema_version", "model", "family", "groups", "transforms", "size", "accuracy", "speed", "train", "data",
        "versions", "command", "notes", "before", "lineage", "store", "baselines", "made_of", "why",
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


@pytest.mark.parametrize(
    ("gates", "missed"),
    [
        (GateRecipe(max_drop=1.5, min_ratio=3.7, max_size=100), []),
        (GateRecipe(max_drop=1.4), ["--max-drop 1.4: top-1 drops by 1.50 points."]),
        (GateRecipe(min_ratio=9.0), ["--min-ratio 9: 3.77 times fewer parameters."]),
        (GateRecipe(max_size=99), ["--max-size 99 bytes: the file has 100."]),
    ],
    ids=str,
)
def test_gates(gates: GateRecipe, missed: list[str]) -> None:
    assert missed_gates(REPORT, gates, file_bytes=100) == missed


def test_a_gate_that_cannot_be_measured_is_missed() -> None:
    for report in (UNLABELLED, replace(REPORT, accuracy=None)):
        assert missed_gates(report, GateRecipe(max_drop=50.0), file_bytes=1)[0].startswith(
            "--max-drop 50: not measured"
        )


def test_the_picture_is_the_same_each_time_and_is_told_in_words() -> None:
    svg = to_svg(REPORT)
    assert svg is not None
    assert svg == to_svg(REPORT)
    assert "<dc:date>" not in svg
    text = "Size against top-1: teacher 346.27 MB, 86.00 %; student 91.81 MB, 84.50 %."
    assert f"![{text}](my%20mini.report.svg)" in to_markdown(REPORT, picture="my mini.report.svg")
    assert "![" not in to_markdown(REPORT)


@pytest.mark.parametrize("report", [UNLABELLED, replace(REPORT, accuracy=None)])
def test_without_two_accuracies_nothing_is_drawn(report: Report) -> None:
    assert to_svg(report) is None


def test_a_teacher_whose_size_is_not_the_reports_is_not_drawn() -> None:
    tuned = replace(REPORT, lineage=(Parent("mini.safetensors", "0" * 64, "vitcompress compress deit_base"),))
    assert [point.name for point in points_of(tuned)] == ["student"]
    own = replace(tuned, train=replace(REPORT.train, teacher=REPORT.model))
    assert [point.name for point in points_of(own)] == ["teacher", "student"]


def test_names_of_any_kind_and_points_in_one_place_can_be_drawn() -> None:
    names = ("$x_1", "日本", "a" * 80, "[link](x)", "_x")
    points = [Point(name, 1_000_000, 90.0, "baseline") for name in names]
    svg = draw_sizes(points, "$title_1")
    assert svg.startswith("<?xml")
    assert all(f"<!-- {name}, 1.00 MB, 90.00 % -->" in svg for name in ("$x_1", "[link](x)", "_x"))
    assert "]" not in alt_text(points)


def test_the_report_says_what_layers_are_made_of() -> None:
    residual = Group(("blocks.0", "blocks.2"), ("attn.qkv.weight",), {"attn.qkv": 4}, ("attn.qkv",))
    product = Group(("blocks.1",), (), {"attn.qkv": 8, "mlp.fc1": 8}, widths=Widths(hidden=48, qk=16, v=12))
    report = replace(REPORT, groups=(2, 1), made_of=(residual, product))
    assert from_json(json.loads(json.dumps(to_json(report)))) == report
    for text in (shown(report), to_markdown(report)):
        assert "3 blocks in groups of 2+1, taken in turn" in text
        assert "2 of 3 blocks: residuals of rank 4 with a basis of the group added to the matrices of attn.qkv." in text
        assert "1 of 3 blocks: products of rank 8 in place of the matrices of attn.qkv, mlp.fc1." in text
        assert "narrow, 48 hidden neurons, 16 channels of queries and keys per head, 12 channels of values" in text
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


def changed(where: str, value: object) -> dict[str, Any]:
    """A report with a value of someone else's: `size.student_bytes`, `made_of.0.blocks`."""
    tree: dict[str, Any] = json.loads(json.dumps(to_json(FULL)))
    *way, last = where.split(".")
    holder: Any = tree
    for name in way:
        holder = holder[int(name)] if isinstance(holder, list) else holder[name]
    holder[int(last) if isinstance(holder, list) else last] = value
    return tree


FULL = replace(
    REPORT,
    accuracy=replace(ACCURACY, classes=(ClassHits(0, 4, 3, 2),)),
    baselines=(Baseline("teacher int8", 9, 9, 85.0, 1.0, None, None),),
    made_of=(Group(("blocks.0", "blocks.1"), ("attn.qkv.weight",)),),
)


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


def test_names_of_a_report_are_no_markup() -> None:
    name = "[/bold][link=https://x.example]`a`[/link]![i](https://x.example)"
    report = replace(FULL, model=name, baselines=(replace(FULL.baselines[0], name=name),))
    assert shown(report).count("[/bold][link=") == 3  # the model, the baseline in the table and in the first sentence
    written = to_markdown(report)
    assert r"\[/bold\]\[link=https://x.example\]\`a\`" in written
    assert re.search(r"(?<!\\)[\[!]", written) is None


def test_a_ratio_that_is_no_number_meets_no_gate() -> None:
    for ratio in (float("nan"), float("inf")):
        report = replace(REPORT, size=replace(REPORT.size, params_ratio=ratio))
        assert missed_gates(report, GateRecipe(min_ratio=1.0), file_bytes=1)
    report = replace(REPORT, accuracy=replace(ACCURACY, top1_drop=float("nan")))
    assert missed_gates(report, GateRecipe(max_drop=1.0), file_bytes=1)


def test_places_are_found_in_long_text_at_once() -> None:
    start = time.perf_counter()
    assert without_places("~" * 200_000 + "me/a/b").endswith("…/b")
    assert time.perf_counter() - start < 5
    assert without_places("--data=~me/a/b") == "--data=…/b"
