"""The report as a page to look at: one file of HTML, with nothing to load and nothing to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vitcompress.measure.examples import Examples
from vitcompress.recipe import GateRecipe, flag_of
from vitcompress.report.curves import curve_names, curve_rows, draw_curves, told
from vitcompress.report.gates import missed_gates
from vitcompress.report.inline import inline_svg
from vitcompress.report.model import Report
from vitcompress.report.picture import Point, alt_text, draw, points_of
from vitcompress.report.private import shareable, without_places
from vitcompress.report.sharing import boxes, groups_of, in_words, letters
from vitcompress.report.terminal import (  # fmt: skip
    accuracy_rows,
    baseline_columns,
    baseline_rows,
    made_of,
    megabytes,
    remarks,
    sharing,
    size_rows,
    speed_rows,
)

_SIZE = (4.4, 3.8)  # of a drawing, in inches: on a phone its type is still read
_FEWEST_IMAGES = 10  # of a class that is shown
_MOST_GATE = 1e18  # of a recipe from a file, which is text to be shown
_MOST_LETTERS = 60  # of a class's name
PAGES = Environment(
    loader=PackageLoader("vitcompress.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    autoescape=True,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A file that is shown.

    Attributes:
        name: of the file.
        file_bytes: its size on the disk.
        report: of what is in it.
        recipe: it was made by, with its gates.
        classes: names of the model's classes, in order; empty where they are not known.
    """

    name: str
    file_bytes: int
    report: Report
    recipe: Mapping[str, Any]
    classes: Sequence[str] = ()


def to_html(result: Result, examples: Examples | None = None) -> str:
    """A file's report as one page of HTML, safe to be passed on and safe to be opened.

    Args:
        result: what to show.
        examples: what an evaluation collected; None where there was none.
    """
    report = shareable(result.report)
    return PAGES.get_template("report.html.j2").render(
        result=result,
        report=report,
        sharing=sharing(report.groups, report.made_of),
        cards=cards(report, result.file_bytes),
        gates=gate_rows(result),
        boxes=boxes(report),
        shared=in_words(report),
        groups=_group_rows(report),
        sizes=[*size_rows(report.size), ("weights in memory", *_memory(report), "")],
        accuracies=accuracy_rows(report),
        speeds=speed_rows(report),
        plot=size_plot(points_of(report), report.model),
        columns=baseline_columns(report),
        baselines=baseline_rows(report),
        classes=class_rows(report, result.classes),
        confusions=confusion_rows(report, result.classes),
        examples=examples,
        pictures=_pictures(examples, result.classes),
        anew=examples and examples.accuracy and without_places(examples.accuracy.data),
        curve=_curve(report),
        curve_columns=["step", *("sum" if name == "loss" else name for name in curve_names(report.train)), "rate"],
        curve_rows=curve_rows(report.train),
        remarks=remarks(report),
        recipe=recipe_text(result.recipe),
    )


def cards(report: Report, file_bytes: int) -> list[tuple[str, str, str]]:
    """The headline: what it is, its number, and what to know of it."""
    size, found = report.size, report.accuracy
    shown = [
        ("file", megabytes(file_bytes), f"tensors {size.bytes_ratio:.2f}× smaller"),
        ("parameters", f"{size.student_params:,}", f"{size.params_ratio:.2f}× fewer than {size.teacher_params:,}"),
    ]
    if found is None:
        return [*shown, ("accuracy", "–", "not measured: there were no images")]
    if found.student_top1 is not None:
        teacher = f"teacher {found.teacher_top1:.2f} %, " if found.teacher_top1 is not None else ""
        shown.append(("top-1", f"{found.student_top1:.2f} %", f"{teacher}on {found.num_images:,} images"))
    if found.top1_drop is not None and found.top1_drop_ci95 is not None:
        low, high = found.top1_drop_ci95
        shown.append(("top-1 drop", f"{found.top1_drop:.2f} points", f"95 % interval {low:.2f} to {high:.2f}, paired"))
    if found.agreement is not None:
        shown.append(("agreement", f"{found.agreement:.2f} %", "of images on which student and teacher say the same"))
    if found.feature_cosine is not None:
        shown.append(("features", f"{found.feature_cosine:.4f}", "cosine similarity with the teacher's"))
    return shown


def gate_rows(result: Result) -> list[tuple[str, bool, str]]:
    """The gates that a file was made under: the flag, whether it is met, and what was missed."""
    gates = result.recipe.get("gates")
    given = gates if isinstance(gates, Mapping) else {}
    found = []
    for field in dataclasses.fields(GateRecipe):
        value = given.get(field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _MOST_GATE:
            gate = GateRecipe(**{field.name: value})  # type: ignore[arg-type]
            missed = missed_gates(result.report, gate, file_bytes=result.file_bytes)
            flag = f"{flag_of(field.name)} {value:,g}" if value < 1e6 else f"--max-size {value:,} bytes"
            found.append((flag, not missed, missed[0].partition(": ")[2] if missed else ""))
    return found


def class_rows(report: Report, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The classes that changed most: name, images, accuracy of teacher and student, change; empty without labels.

    Classes of a few images are left out: of one image, each change is one of 100 points.
    """
    found: list[tuple[str, ...]] = []
    for row in report.accuracy.classes if report.accuracy else ():
        if row.num_images < _FEWEST_IMAGES:
            continue
        before, after = row.teacher_hits, row.student_hits
        change = "" if before is None else f"{100 * (after - before) / row.num_images:+.1f} points"
        teacher = "–" if before is None else f"{100 * before / row.num_images:.1f} %"
        student = f"{100 * after / row.num_images:.1f} %"
        found.append((_class(names, row.index), f"{row.num_images:,}", teacher, student, change))
    return found


def confusion_rows(report: Report, names: Sequence[str]) -> list[tuple[str, ...]]:
    """What the student confuses: the class, what it says instead, on how many images the teacher and it do."""
    return [
        (
            _class(names, row.label),
            _class(names, row.predicted),
            "–" if row.teacher_images is None else f"{row.teacher_images:,}",
            f"{row.student_images:,}",
        )
        for row in (report.accuracy.confusions if report.accuracy else ())
    ]


def _pictures(examples: Examples | None, names: Sequence[str]) -> list[tuple[str, bool, str, str, str]]:
    """Example images: picture, whether it is small, its class, what the teacher and what the student say."""
    return [
        (
            each.picture,
            each.small,
            _class(names, each.label) if each.label >= 0 else "not known",
            f"{_class(names, each.teacher)} ({each.teacher_percent:.0f} %)",
            f"{_class(names, each.student)} ({each.student_percent:.0f} %)",
        )
        for each in (examples.found() if examples else ())
    ]


def _class(names: Sequence[str], index: int) -> str:
    """The name of a class; its number where the name is not known."""
    return names[index][:_MOST_LETTERS] if 0 <= index < len(names) else f"class {index}"


def size_plot(points: Sequence[Point], title: str) -> Markup:
    """Size against top-1; empty where fewer than two models have one."""
    if len(points) < 2:
        return Markup("")
    return Markup(inline_svg(draw(points, title, _SIZE), "plot", "Size against top-1", alt_text(points)))


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as its YAML file, without what was left at none, and without places."""
    given = {
        stage: {name: value for name, value in fields.items() if value is not None}
        for stage, fields in recipe.items()
        if isinstance(fields, Mapping)
    }
    kept = {stage: fields for stage, fields in given.items() if fields}
    return yaml.safe_dump(without_places(kept), sort_keys=False, allow_unicode=True)


def _group_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """The groups in words: name, blocks, what they share, what they are made of."""
    groups = groups_of(report)
    return [
        (
            name or "–",
            ", ".join(block.removeprefix("blocks.") for block in group.blocks),
            ", ".join([*group.shared, *(f"{layer} (basis)" for layer in group.bases)]) if name else "",
            made_of(group),
        )
        for name, group in zip(letters(groups), groups, strict=True)
    ]


def _memory(report: Report) -> tuple[str, str]:
    """What the weights of both take once loaded: the student's are floats again, unless it is told to keep its own."""
    size = report.size
    each = size.teacher_bytes / max(1, size.teacher_params)
    own = size.student_params * each if report.store in ("int8", "int4") else size.student_bytes
    kept = f" ({megabytes(size.student_bytes)} with keep_quantized)" if report.store in ("int8", "int4") else ""
    return megabytes(size.teacher_bytes), f"{megabytes(round(own))}{kept}"


def _curve(report: Report) -> Markup:
    if len(report.train.loss_curve) < 2 or not curve_names(report.train):
        return Markup("")
    return Markup(inline_svg(draw_curves(report.train), "curve", "Losses during training", told(report.train)))
