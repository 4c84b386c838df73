"""HTML pages show the numbers, keep hostile text as text, and open in a browser."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from timm.data import ImageNetInfo

from tests.conftest import Vitcompress
from tests.report.pages import Seen, assert_safe, needs_chromium, shown_by_chromium
from tests.report.samples import BASELINES, CURVE, REPORT, RESULT, TRAINED, UNLABELLED
from vitcompress.distill.log import TrainLog
from vitcompress.measure.results import ClassHits, Confusion
from vitcompress.pipeline.pages import class_names
from vitcompress.plans.model import Group
from vitcompress.recipe.compose import build, from_dict, to_dict
from vitcompress.report.compare import compared_html
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import Result, from_json, to_json
from vitcompress.report.page import gate_rows, recipe_text, to_html
from vitcompress.report.private import without_places
from vitcompress.report.sharing import describe_boxes

EVIL = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}|`"


def test_a_page_has_the_numbers_of_the_report() -> None:
    text = Seen(to_html(RESULT)).text
    for number in ("22,953,064", "3.77×", "92.00 MB", "84.50 %", "1.50 points", "-0.20 to 3.20", "10.0 ms", "1.20×"):
        assert number in text
    for name in ("teacher int8", "85.75 %", "12 blocks in groups of 5+5+2", "smaller, not faster", REPORT.command):
        assert name in text
    assert "✗ missed --max-drop 1 : top-1 drops by 1.50 points." in text
    assert_safe(to_html(RESULT))


def test_a_page_is_the_same_each_time_and_its_charts_are_told_in_words() -> None:
    html = to_html(RESULT)
    assert html == to_html(RESULT)
    charts = [attributes for tag, attributes in Seen(html).tags if attributes.get("role") == "img"]
    assert len(charts) == 4
    for chart in charts:
        if "aria-label" in chart:
            assert chart["aria-label"] == describe_boxes(TRAINED)
        else:
            for key in (chart["aria-labelledby"] or "").split():
                assert f'id="{key}"' in html
    assert "Size against top-1: teacher 346.27 MB, 86.00 %" in html
    assert "logits from 2 to 0.05128" in html
    assert "During training, top-1 on 256 of these images: 70.31 % at step 0, 83.98 % at step 500." in html
    assert not re.search(r"#d55e00|#0072b2|#ffffff|#000000", html)  # only colours that follow light and dark


@pytest.mark.parametrize(
    "report",
    [UNLABELLED, replace(REPORT, accuracy=None, speed=None, train=TrainLog()), replace(REPORT, groups=(1,) * 12)],
    ids=["no labels", "nothing measured", "nothing shared"],
)
def test_what_was_not_measured_is_said(report: Any) -> None:
    html = to_html(replace(RESULT, report=report))
    assert_safe(html)
    text = Seen(html).text
    if report.accuracy is None:
        assert "not measured: there were no images" in text
    if report.speed is None:
        assert "Latency Latency was not measured." in text
    assert ("no picture of size" in text) == (report is not None and report.groups != (1,) * 12)


def test_a_curve_of_cosines_is_drawn_as_such() -> None:
    curve = tuple({"step": float(step), "images": 128.0, "feature_cosine": 0.5 + step / 10} for step in range(3))
    html = to_html(replace(RESULT, report=replace(TRAINED, train=replace(TRAINED.train, accuracy_curve=curve))))
    assert "cosine similarity of features on 128 of these images: 0.5000 at step 0, 0.6000 at step 1" in html
    assert "cosine similarity of features (%)" not in html


def test_the_time_of_a_command_is_told_by_stage() -> None:
    text = Seen(to_html(RESULT)).text
    assert "latencies and writing: 140 s (loading 4 s, training 120 s, evaluation 16 s)." in text


def test_classes_have_names_where_they_are_known() -> None:
    hits, confusions = (
        (ClassHits(1, 50, 40, 30), ClassHits(7, 12, 3, 6), ClassHits(8, 4, 1, 2)),
        (Confusion(1, 0, 2, 9),),
    )
    accuracy = replace(TRAINED.accuracy, classes=hits, confusions=confusions)  # type: ignore[type-var]
    report = replace(TRAINED, accuracy=accuracy)
    assert from_json(json.loads(json.dumps(to_json(report)))) == report
    text = Seen(to_html(replace(RESULT, report=report, classes=("ape", EVIL)))).text
    assert f"{EVIL[:60]} 50 80.0 % 60.0 % -20.0 points" in text
    assert "class 7 12 25.0 % 50.0 % +25.0 points" in text
    assert "class 8" not in text  # of so few images, one is 25 points
    assert f"{EVIL[:60]} ape 2 9" in text
    assert "There are no numbers for single classes" in Seen(to_html(RESULT)).text


def test_a_hostile_report_stays_text() -> None:
    accuracy = replace(TRAINED.accuracy, data=EVIL)  # type: ignore[type-var]
    curve = tuple({**point, EVIL: 1.0} for point in CURVE)
    accuracies = ({EVIL: 1.0}, {"top1": 1.0}, {"step": 0.0}, {"step": 1e300, "top1": -1e300, "images": 1e300})
    report = replace(
        TRAINED, model=EVIL, command=EVIL, notes=(EVIL,), why=(EVIL,), transforms=(EVIL,), versions={EVIL: EVIL},
        accuracy=accuracy, data=EVIL, seconds={EVIL: 1.0},
        train=replace(TRAINED.train, loss_curve=curve, accuracy_curve=accuracies, teacher=EVIL),
        made_of=(Group((f"blocks.0.{EVIL}.0", "blocks.1"), (EVIL,)),), baselines=(replace(BASELINES[0], name=EVIL),),
    )  # fmt: skip
    result = Result(EVIL, 1, report, {EVIL: {EVIL: EVIL}, "gates": {"max_drop": EVIL}}, (EVIL,))
    for html in (to_html(result), compared_html([result, result])):
        assert_safe(html)
        assert "{{7*7}}" in html
        assert "<script" not in html
    markdown = to_markdown(report)
    assert "<script" not in markdown.split("How it was made")[0]
    assert "\n````" not in markdown  # one backtick needs no longer fence


def test_a_page_names_no_folder_but_in_the_command() -> None:
    places = {"data": "/home/me/images/val", "val": "wds:/data/x y/a-{0..9}.tar", "win": "C:\\Users\\me\\w.pth"}
    assert list(without_places(places).values()) == ["…/val", "wds:…/a-{0..9}.tar", "…/w.pth"]
    kept = ("hf-hub:timm/vit_tiny", "torch/cifar10", "images/val", "3/4", "a and/or b")
    assert without_places(kept) == list(kept)
    secret = "/home/somebody/secret"
    report = replace(
        TRAINED, data=f"{secret}/train", notes=(f"Of {secret}/w.pth.",),
        accuracy=replace(TRAINED.accuracy, data=f"{secret}/val"),  # type: ignore[type-var]
    )  # fmt: skip
    result = replace(RESULT, report=report, recipe={"model": {"checkpoint": f"{secret}/w.pth"}})
    assert "secret" not in to_html(result) + compared_html([result, result])
    assert "checkpoint: …/w.pth" in to_html(result)


def test_the_recipe_on_the_page_is_the_recipe() -> None:
    recipe = build({"model": "deit_tiny", "share": 3, "lr": 1e-4, "loss": ["logits=1"], "transforms": "heads"})
    assert from_dict(yaml.safe_load(recipe_text(to_dict(recipe)))) == recipe


def test_gates_are_those_of_the_recipe() -> None:
    gates = {"max_drop": 2, "min_ratio": 9.0, "max_size": 92_000_000}
    rows = gate_rows(replace(RESULT, recipe={"gates": gates}))
    assert [(flag, met) for flag, met, _ in rows] == [
        ("--max-drop 2", True), ("--min-ratio 9", False), ("--max-size 92,000,000 bytes", True)
    ]  # fmt: skip
    assert gate_rows(replace(RESULT, recipe={})) == []


def test_imagenet_classes_are_told_by_name_where_the_source_was_a_local_file() -> None:
    synsets = tuple(ImageNetInfo("imagenet-1k").label_names())
    manifest: Any = SimpleNamespace(source={"model_args": {}, "pretrained_cfg": {}}, classes=synsets)
    assert class_names(manifest)[985] == "daisy"
    manifest.classes = ()
    assert class_names(manifest) == ()


def test_report_compare_and_diff_on_the_command_line(made: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    file, page = made / "mini.safetensors", tmp_path / "out.html"
    ended = vitcompress("report", file, "--html", page)
    assert (ended.code, ended.out, ended.err.split()) == (0, "", ["wrote", str(page)])
    assert_safe(page.read_text(encoding="utf-8"))
    copy = Path(shutil.copy(file, tmp_path / "copy.safetensors"))
    assert re.search(r"parameters +│ 21,245", vitcompress("compare", file, copy).out)
    both = json.loads(vitcompress("compare", file, copy, "--json").out)
    assert [row["file"] for row in both] == ["mini.safetensors", "copy.safetensors"]
    assert vitcompress("compare", file, copy, "--html", page).code == 0
    assert "copy.safetensors" in page.read_text(encoding="utf-8")
    assert "have the same plan, recipe, numbers and versions" in vitcompress("diff", file, copy).out
    assert json.loads(vitcompress("diff", file, copy, "--json").out) == []


def test_mistakes_end_with_a_hint(made: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    file = made / "mini.safetensors"
    for words in (
        ["compare", file],
        ["diff", file, tmp_path / "none"],
        ["report", file, "--html", tmp_path / "a/b.html"],
    ):
        assert vitcompress(*words).code == 2


def test_images_on_which_the_two_differ_are_shown(
    mini: Path, images: Path, weights: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    page = tmp_path / "out.html"
    words = ["--data", images, "--checkpoint", weights, "--num-workers", 0]
    ended = vitcompress("report", mini, "--html", page, *words)
    assert ended.code == 0, ended.err
    html = page.read_text(encoding="utf-8")
    assert_safe(html)
    assert "evaluated again for this page" in html or "Student and teacher agree on all 10 images" in html
    assert vitcompress("report", mini, *words).code == 2


@pytest.mark.thorough
@needs_chromium
@pytest.mark.parametrize("kind", ["report", "compare", "hostile"])
def test_chromium_shows_a_page_without_an_error(kind: str, tmp_path: Path) -> None:
    evil = replace(RESULT, name=EVIL, report=replace(TRAINED, model=EVIL, notes=(EVIL,)))
    html = {"report": to_html(RESULT), "compare": compared_html([RESULT, RESULT]), "hostile": to_html(evil)}[kind]
    shown = shown_by_chromium(html, tmp_path)
    assert "22,953,064" in shown
    assert "<script" not in shown.lower()
