"""Lay out a report's numbers as rows of text, for every rendering."""

from __future__ import annotations

from vitcompress.measure.results import Accuracy
from vitcompress.plans.model import Size
from vitcompress.report.model import Report

Row = tuple[str, str, str, str]
COLUMNS = ("", "teacher", "student", "change")
MEASURES = {  # fields of a baseline, and what each is called
    "top1": "top-1",
    "agreement": "agreement with the teacher",
    "r2": "R² against the teacher",
    "feature_cosine": "cosine similarity of features",
}
PERCENT = ("top1", "agreement")  # measures in percent
_MAX_FITS = 8  # outputs that have rows of their own


def report_rows(report: Report) -> list[Row]:
    """Return all rows of a report: name, teacher, student, change."""
    return [*size_rows(report.size), *report_accuracy_rows(report), *speed_rows(report)]


def size_rows(size: Size) -> list[Row]:
    """Return rows for parameters, bytes and multiply-accumulates."""
    fewer = _times(size.params_ratio, "fewer", "more")
    smaller = _times(size.bytes_ratio, "smaller", "larger")
    macs = "" if size.macs_ratio is None else _times(size.macs_ratio, "fewer", "more")
    return [
        ("parameters", f"{size.teacher_params:,}", f"{size.student_params:,}", fewer),
        ("tensors", megabytes(size.teacher_bytes), megabytes(size.student_bytes), smaller),
        ("MACs per image", _macs(size.teacher_macs), _macs(size.student_macs), macs),
    ]


def report_accuracy_rows(report: Report) -> list[Row]:
    """Return rows for all accuracies, also before fine-tuning; empty if none was measured."""
    rows: list[Row] = []
    if report.before and report.before.student_top1 is not None:
        rows.append(("top-1 before fine-tuning", "", percent(report.before.student_top1), ""))
    return [*rows, *(accuracy_rows(report.accuracy) if report.accuracy else [])]


def accuracy_rows(accuracy: Accuracy) -> list[Row]:
    """Return rows for what was measured on one set of images."""
    rows: list[Row] = []
    if accuracy.student_top1 is not None:
        change = "" if accuracy.top1_drop is None else _points(accuracy.top1_drop)
        rows.append(("top-1", percent(accuracy.teacher_top1), percent(accuracy.student_top1), change))
        rows.append(("top-5", percent(accuracy.teacher_top5), percent(accuracy.student_top5), ""))
    if accuracy.agreement is not None:
        rows.append((MEASURES["agreement"], "", percent(accuracy.agreement), ""))
    if accuracy.mean_average_precision is not None:
        rows.append(("mean average precision", "", percent(accuracy.mean_average_precision), ""))
    if accuracy.outputs == "multi_label" and accuracy.kl is not None:  # the two above do not see every change
        rows.append(("KL from the teacher, per image", "", f"{accuracy.kl:.4g} nats", ""))
    if accuracy.r2 is not None:
        rows.append((MEASURES["r2"], "", f"{accuracy.r2:.4f}", ""))
    if accuracy.relative_rmse is not None:
        rows.append(("error in the teacher's deviation", "", f"{accuracy.relative_rmse:.4f}", ""))
    rows += _fit_rows(accuracy)
    if accuracy.feature_cosine is not None:
        rows.append((MEASURES["feature_cosine"], "", f"{accuracy.feature_cosine:.4f}", ""))
    return rows


def _fit_rows(accuracy: Accuracy) -> list[Row]:
    """Return a row for each output of a regression; empty if there is one output, or many."""
    if not 1 < len(accuracy.fits) <= _MAX_FITS:
        return []
    return [
        (f"output {fit.index}: deviation, error, R²", f"{fit.deviation:.4g}", f"{fit.rmse:.4g}", f"{fit.r2:.4f}")
        for fit in accuracy.fits
    ]


def speed_rows(report: Report) -> list[Row]:
    """Return a row for the latency at each batch size; empty if latencies were not measured."""
    if report.speed is None:
        return []
    student_ms = report.speed.student_ms
    return [
        (
            f"latency, batch {batch}",
            f"{teacher_ms:.1f} ms",
            f"{student_ms[batch]:.1f} ms",
            _times(student_ms[batch] / teacher_ms, "slower", "faster"),
        )
        for batch, teacher_ms in report.speed.teacher_ms.items()
    ]


def baseline_columns(report: Report) -> list[str]:
    """Return the column heads of `baseline_rows`."""
    return ["", "parameters", "tensors", MEASURES[baseline_measure(report)], "change"]


def baseline_rows(report: Report) -> list[tuple[str, ...]]:
    """Return rows for the student and the quantized teachers; empty if these were not measured."""
    if not report.baselines or report.accuracy is None:
        return []
    size, accuracy, measure = report.size, report.accuracy, baseline_measure(report)
    name = "student" if report.store == "source" else f"student {report.store}"
    student = (name, size.student_params, size.student_bytes, student_value(accuracy, measure), accuracy.top1_drop)
    baselines = [(b.name, b.params, b.bytes, getattr(b, measure), b.top1_drop) for b in report.baselines]
    return [
        (name, f"{params:,}", megabytes(num_bytes), show_measure(value, measure), "" if drop is None else _points(drop))
        for name, params, num_bytes, value, drop in (student, *baselines)
    ]


def baseline_measure(report: Report) -> str:
    """Return the key of `MEASURES` that the baselines of a report are compared by."""
    return next((name for b in report.baselines for name in MEASURES if getattr(b, name) is not None), "top1")


def student_value(accuracy: Accuracy, measure: str) -> float | None:
    """Return the student's value of a key of `MEASURES`."""
    value: float | None = getattr(accuracy, "student_top1" if measure == "top1" else measure)
    return value


def show_measure(value: float | None, measure: str) -> str:
    """Format a value of a key of `MEASURES`; a dash for None."""
    return percent(value) if measure in PERCENT or value is None else f"{value:.4f}"


def megabytes(num_bytes: int) -> str:
    """Format bytes as MB (10⁶)."""
    return f"{num_bytes / 1e6:.2f} MB"


def percent(value: float | None) -> str:
    """Format a percentage; a dash for None."""
    return "–" if value is None else f"{value:.2f} %"


def _points(drop: float) -> str:
    """Format a drop as a change of accuracy; a change of zero has no sign."""
    return f"{-drop:+.2f} points" if round(drop, 2) else "0.00 points"


def _times(ratio: float, above: str, below: str) -> str:
    """Format a ratio as a factor of at least one: `1.25× fewer`, or `1.25× more` for 0.8.

    Args:
        ratio: positive.
        above: word for ratios of one and above.
        below: word for ratios below one, which are inverted.
    """
    return f"{ratio:.2f}× {above}" if ratio >= 1 else f"{1 / ratio:.2f}× {below}"


def _macs(count: int | None) -> str:
    """Format multiply-accumulates in the unit that suits them: `17.56 G`."""
    if count is None:
        return "unknown"
    unit, factor = ("G", 1e9) if count >= 1e9 else ("M", 1e6)
    return f"{count / factor:.2f} {unit}"
