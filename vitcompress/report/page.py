"""Write a report as a self-contained HTML page that loads nothing and runs nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup

from vitcompress.recipe import GateRecipe, flag_of
from vitcompress.report.curves import (
    accuracy_points,
    curve_columns,
    curve_rows,
    describe_accuracy,
    describe_curves,
    draw_accuracy,
    draw_curves,
)
from vitcompress.report.gates import missed_gates
from vitcompress.report.kinds import CLASSES, words_for
from vitcompress.report.model import Report, Result
from vitcompress.report.picture import Point, alt_text, draw_sizes, points_of
from vitcompress.report.private import shareable, without_places
from vitcompress.report.remarks import report_remarks
from vitcompress.report.render import render
from vitcompress.report.rows import (
    COLUMNS,
    Row,
    baseline_columns,
    baseline_rows,
    megabytes,
    report_accuracy_rows,
    size_rows,
    speed_rows,
)
from vitcompress.report.sharing import boxes, describe_boxes, describe_sharing, group_rows
from vitcompress.report.svg import inline_svg

if TYPE_CHECKING:
    from vitcompress.measure.examples import Examples, Prediction

_SIZE = (4.4, 3.2)  # of the picture, in inches: its text stays readable on a phone
_MIN_IMAGES = 10  # of a class; with fewer, one image changes its accuracy by more than 10 points
_MAX_GATE = 1e18  # recipes in a file are not checked and may hold any number
_MAX_LETTERS = 60  # of a class's name


def to_html(result: Result, examples: Examples | None = None) -> str:
    """Return a file's report as one HTML page, safe to share and safe to open.

    Args:
        result: the file to show.
        examples: images collected by an evaluation; None if there was none.
    """
    report = shareable(result.report)
    return render(
        "report.html.j2",
        result=result,
        report=report,
        sharing=describe_sharing(report.groups, report.made_of),
        cards=cards(report, result.file_bytes),
        gates=gate_rows(result),
        boxes=boxes(report),
        boxes_text=describe_boxes(report),
        groups=group_rows(report),
        columns=COLUMNS,
        sizes=[*size_rows(report.size), _memory_row(report)],
        accuracies=report_accuracy_rows(report),
        speeds=speed_rows(report),
        plot=size_plot(points_of(report), report.model),
        baseline_columns=baseline_columns(report),
        baselines=baseline_rows(report),
        classes=class_rows(report, result.classes),
        confusions=confusion_rows(report, result.classes),
        examples=examples,
        words=words_for(examples.kind.name if examples else report.outputs),
        example_rows=_example_rows(examples, result.classes),
        example_data=examples and examples.accuracy and without_places(examples.accuracy.data),
        curve=_curve_plot(report),
        accuracy_curve=_accuracy_plot(report),
        curve_columns=curve_columns(report.train),
        curve_rows=curve_rows(report.train),
        remarks=report_remarks(report),
        recipe=recipe_text(result.recipe),
    )


def cards(report: Report, file_bytes: int) -> list[tuple[str, str, str]]:
    """Return the headline numbers: name, number, explanation."""
    size, accuracy = report.size, report.accuracy
    rows = [
        ("file", megabytes(file_bytes), f"tensors {size.bytes_ratio:.2f}× smaller"),
        ("parameters", f"{size.student_params:,}", f"{size.params_ratio:.2f}× fewer than {size.teacher_params:,}"),
    ]
    if accuracy is None:
        return [*rows, ("accuracy", "–", "not measured: there were no images")]
    if accuracy.student_top1 is not None:
        teacher = f"teacher {accuracy.teacher_top1:.2f} %, " if accuracy.teacher_top1 is not None else ""
        rows.append(("top-1", f"{accuracy.student_top1:.2f} %", f"{teacher}on {accuracy.num_images:,} images"))
    if accuracy.top1_drop is not None and accuracy.top1_drop_ci95 is not None:
        low, high = accuracy.top1_drop_ci95
        interval = f"95 % interval {low:.2f} to {high:.2f}, paired"
        rows.append(("top-1 drop", f"{accuracy.top1_drop:.2f} points", interval))
    if accuracy.agreement is not None:
        rows.append(("agreement", f"{accuracy.agreement:.2f} %", words_for(accuracy.outputs).agreement))
    if accuracy.mean_average_precision is not None:
        rows.append(("precision", f"{accuracy.mean_average_precision:.2f} %", "mean average, of the teacher's labels"))
    if accuracy.r2 is not None:
        rows.append(("R²", f"{accuracy.r2:.4f}", "of the teacher's numbers; 1 is equal, 0 is their mean"))
    if accuracy.relative_rmse is not None:
        rows.append(("error", f"{accuracy.relative_rmse:.4f}", "of the deviation of the teacher's numbers"))
    if accuracy.feature_cosine is not None:
        rows.append(("features", f"{accuracy.feature_cosine:.4f}", "cosine similarity with the teacher's"))
    return rows


def gate_rows(result: Result) -> list[tuple[str, bool, str]]:
    """Return the gates in a file's recipe: flag, whether it is met, and why not."""
    gates = result.recipe.get("gates")
    gates = gates if isinstance(gates, Mapping) else {}
    rows = []
    for field in dataclasses.fields(GateRecipe):
        value = gates.get(field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _MAX_GATE:
            gate = GateRecipe(**{field.name: value})  # type: ignore[arg-type]
            missed = missed_gates(result.report, gate, file_bytes=result.file_bytes)
            flag = f"{flag_of(field.name)} {value:,g}" if value < 1e6 else f"--max-size {value:,} bytes"
            rows.append((flag, not missed, missed[0].partition(": ")[2] if missed else ""))
    return rows


def class_rows(report: Report, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the classes whose accuracy changed most; those with few images are left out.

    Args:
        report: report to show.
        names: names of the classes, in order.

    Returns:
        Rows of name, images, accuracy of teacher and student, and change; empty without labels.
    """
    rows: list[tuple[str, ...]] = []
    for row in report.accuracy.classes if report.accuracy else ():
        if row.num_images < _MIN_IMAGES:
            continue
        before, after = row.teacher_hits, row.student_hits
        change = "" if before is None else f"{100 * (after - before) / row.num_images:+.1f} points"
        teacher = "–" if before is None else f"{100 * before / row.num_images:.1f} %"
        student = f"{100 * after / row.num_images:.1f} %"
        rows.append((_class_name(names, row.index), f"{row.num_images:,}", teacher, student, change))
    return rows


def confusion_rows(report: Report, names: Sequence[str]) -> list[Row]:
    """Return the student's added mistakes: class, prediction, images of teacher and student."""
    return [
        (
            _class_name(names, row.label),
            _class_name(names, row.predicted),
            "–" if row.teacher_images is None else f"{row.teacher_images:,}",
            f"{row.student_images:,}",
        )
        for row in (report.accuracy.confusions if report.accuracy else ())
    ]


def _example_rows(examples: Examples | None, names: Sequence[str]) -> list[tuple[str, bool, str, str, str]]:
    """Return example images: picture, whether it is small, class, predictions of both models.

    Images have classes only where the outputs are classes.
    """
    words = words_for(examples.kind.name if examples else None)
    return [
        (
            example.picture,
            example.is_small,
            _class_name(names, example.label) if example.label >= 0 and words is CLASSES else "not known",
            _prediction(example.teacher, names, words.item),
            _prediction(example.student, names, words.item),
        )
        for example in (examples.surest() if examples else ())
    ]


def _prediction(prediction: Prediction, names: Sequence[str], noun: str) -> str:
    """Format what a model says of an image: `cat (93 %)`, or `3.1` where there is one output."""
    if prediction.output is None:
        return prediction.value
    return f"{_class_name(names, prediction.output, noun)} ({prediction.value})"


def _class_name(names: Sequence[str], index: int, noun: str = "class") -> str:
    """Return the name of a class, label or output; its number if the name is not known."""
    return names[index][:_MAX_LETTERS] if 0 <= index < len(names) else f"{noun} {index}"


def size_plot(points: Sequence[Point], title: str) -> Markup:
    """Draw size against top-1 as inline SVG; empty with fewer than two points."""
    if len(points) < 2:
        return Markup("")
    return Markup(inline_svg(draw_sizes(points, title, _SIZE), "plot", "Size against top-1", alt_text(points)))


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML, without fields that are None and without names of folders."""
    stages = {
        stage: {name: value for name, value in fields.items() if value is not None}
        for stage, fields in recipe.items()
        if isinstance(fields, Mapping)
    }
    filled = {stage: fields for stage, fields in stages.items() if fields}
    return yaml.safe_dump(without_places(filled), sort_keys=False, allow_unicode=True)


def _memory_row(report: Report) -> Row:
    """Return a row for the memory of loaded weights; quantized ones become floats by default."""
    size = report.size
    student_bytes, note = size.student_bytes, ""
    if report.store in ("int8", "int4"):
        student_bytes = round(size.student_params * size.teacher_bytes / max(1, size.teacher_params))
        note = f" ({megabytes(size.student_bytes)} with keep_quantized)"
    return ("weights in memory", megabytes(size.teacher_bytes), f"{megabytes(student_bytes)}{note}", "")


def _curve_plot(report: Report) -> Markup:
    """Draw the losses as inline SVG; empty with fewer than two points."""
    if len(report.train.loss_curve) < 2 or len(curve_columns(report.train)) < 3:
        return Markup("")
    svg = draw_curves(report.train)
    return Markup(inline_svg(svg, "curve", "Losses during training", describe_curves(report.train)))


def _accuracy_plot(report: Report) -> Markup:
    """Draw the accuracy during training as inline SVG; empty with fewer than two points."""
    if len(accuracy_points(report.train)[1]) < 2:
        return Markup("")
    text = describe_accuracy(report.train)
    return Markup(inline_svg(draw_accuracy(report.train), "accuracy", "Accuracy during training", text))
