"""Write the sentences below a report's tables: what the numbers mean and what they do not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vitcompress.measure.results import Accuracy
from vitcompress.plans.model import Group
from vitcompress.report.curves import describe_accuracy
from vitcompress.report.kinds import words_for
from vitcompress.report.model import Report
from vitcompress.report.rows import MEASURES, baseline_measure, megabytes, show_measure, student_value
from vitcompress.report.sharing import PARTS

STAGES = ("loading", "search", "start", "training", "evaluation")  # in order; JSON in a file is sorted by name
_MAX_WIDTHS = 3  # kinds of narrow blocks that are described one by one


def report_remarks(report: Report) -> list[str]:
    """Return the sentences below the tables of a report."""
    lines = [*better_baseline(report), *plan_remarks(report.made_of, report.why)]
    if report.accuracy:
        lines = [*chance_warning(report.accuracy), *lines, accuracy_remark(report.accuracy)]
    elif words_for(report.outputs).remark:
        lines.append("Outputs were not compared: there were no images, or no teacher.")
    if report.preprocessing:
        lines.append(preprocessing_remark(report.preprocessing))
    lines.append(_training_remark(report))
    lines += filter(None, (describe_accuracy(report.train), _time_remark(report.seconds)))
    if report.lineage:
        parent = report.lineage[-1]
        made_by = f", made by: {parent.command}" if parent.command else "."
        lines.append(f"Fine-tuned from {parent.name} (SHA-256 {parent.sha256[:12]}…){made_by}")
    if report.speed:
        lines.append(f"Latency: median, {_count(report.speed.threads, 'thread')}, {report.speed.device}.")
    return [*lines, *report.notes]


def plan_remarks(groups: Sequence[Group], why: Sequence[str]) -> list[str]:
    """Return the sentences on skipped parts, narrow and factored layers, and on a search's choice.

    Args:
        groups: groups of the plan.
        why: the chosen plan and its alternatives, best first.
    """
    choices = [f"{'Chosen' if number == 0 else 'Alternative'}: {line}." for number, line in enumerate(why)]
    return [*_skip_remarks(groups), *_layer_remarks(groups), *choices]


CAUSES_OF_CHANCE = (
    "The usual causes: another order of classes (--class-order, --class-map), another normalization (--mean, --std), "
    "wrong weights (--checkpoint), or a head for other classes."
)


def chance_remark(accuracy: Accuracy, who: str) -> str:
    """Return a sentence if a model is no better than chance on labeled images; else nothing.

    Args:
        accuracy: what was measured.
        who: the model that was measured, as the subject of the sentence.
    """
    top1 = accuracy.student_top1 if accuracy.teacher_top1 is None else accuracy.teacher_top1
    if accuracy.above_chance is not False or top1 is None or accuracy.chance_top1 is None:
        return ""
    doubt = "" if accuracy.is_at_chance else ", too few to be sure"
    return (
        f"{who} is no better than chance on {accuracy.data}: {top1:.2f} % of {accuracy.num_images:,} images{doubt}; "
        f"always guessing the commonest class gives {accuracy.chance_top1:.2f} %."
    )


def chance_warning(accuracy: Accuracy) -> list[str]:
    """Return a warning, or with few images a note, if the teacher is no better than chance."""
    remark = chance_remark(accuracy, "The student" if accuracy.teacher_top1 is None else "The teacher")
    if accuracy.is_at_chance:
        return [f"Warning: {remark} {CAUSES_OF_CHANCE}"]
    return [remark] if remark else []


def accuracy_remark(accuracy: Accuracy) -> str:
    """Return the sentences on the images that an accuracy was measured on."""
    text = f"Measured on {accuracy.num_images:,} images: {accuracy.data}."
    words = words_for(accuracy.outputs or ("features" if accuracy.feature_cosine is not None else None))
    if accuracy.top1_drop_ci95 is not None:
        low, high = accuracy.top1_drop_ci95
        text += f" 95 % interval of the top-1 drop: {low:.2f} to {high:.2f} points (paired)."
    if words.remark:
        text += words.remark
        if accuracy.outputs == "multi_label" and accuracy.mean_average_precision is None:
            text += " The teacher finds no label on them, so there is no mean average precision."
    elif accuracy.student_top1 is None:
        text += " The images have no labels, so this is agreement with the teacher, not accuracy."
    if accuracy.num_skipped:
        text += f" {accuracy.num_skipped:,} unreadable images were skipped."
    return text


def preprocessing_remark(preprocessing: str) -> str:
    """Return the sentence on how images become the model's input."""
    return f"Preprocessing: {preprocessing}."


def better_baseline(report: Report) -> list[str]:
    """Return a sentence if a baseline beats the student in bytes and accuracy; else nothing."""
    measure, student_bytes = baseline_measure(report), report.size.student_bytes
    student = student_value(report.accuracy, measure) if report.accuracy else None
    smaller = [
        (value, baseline)
        for baseline in report.baselines
        if baseline.bytes < student_bytes and (value := getattr(baseline, measure)) is not None
    ]
    if student is None or not any(value > student for value, _ in smaller):
        return []
    value, best = max(smaller, key=lambda pair: (pair[0], -pair[1].bytes))
    return [
        f"The {best.name}, without training, is smaller than this student ({megabytes(best.bytes)} against "
        f"{megabytes(student_bytes)}) and has a better {MEASURES[measure]} ({show_measure(value, measure)} against "
        f"{show_measure(student, measure)})."
    ]


def _training_remark(report: Report) -> str:
    train = report.train
    if not train.steps:
        return "Converted without training."
    verb = "Trained on labels" if train.teacher is None else "Distilled"
    rate = f"{train.images_per_second:.{'0f' if train.images_per_second >= 10 else '2g'}}"
    return (
        f"{verb} for {train.steps:,} steps, {train.images:,} images in {train.seconds:.0f} s "
        f"({rate} images/s), on {report.data}."
    )


def _time_remark(seconds: Mapping[str, float]) -> str:
    """Return a sentence on where the time went; empty where it is not known."""
    if not seconds:
        return ""
    names = sorted(seconds, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
    stages = ", ".join(f"{name} {seconds[name]:.0f} s" for name in names)
    return f"Time of the command, without latencies and writing: {sum(seconds.values()):.0f} s ({stages})."


def _skip_remarks(groups: Sequence[Group]) -> list[str]:
    """Return a sentence for each part of blocks that some leave out."""
    total = sum(len(group.blocks) for group in groups)
    counts = {part: sum(len(group.blocks) for group in groups if part in group.skipped) for part in PARTS}
    return [
        f"{count} of {total} blocks {'has' if count == 1 else 'have'} no {PARTS[part]}: a constant takes its place."
        for part, count in counts.items()
        if count
    ]


def _layer_remarks(groups: Sequence[Group]) -> list[str]:
    """Return a sentence for each kind of factored or narrow layers, with its number of blocks."""
    counts: dict[tuple[str, bool], int] = {}
    narrow = [group for group in groups if _describe_widths([group])]
    in_one_line = len({_describe_widths([group]) for group in narrow}) > _MAX_WIDTHS  # after a search, usually
    if in_one_line:
        counts[_describe_widths(narrow), True] = sum(len(group.blocks) for group in narrow)
    for group in groups:
        widths = "" if in_one_line else _describe_widths([group])
        texts = [(text, False) for text in _describe_factors(group)] + ([(widths, True)] if widths else [])
        for key in texts:
            counts[key] = counts.get(key, 0) + len(group.blocks)
    total = sum(len(group.blocks) for group in groups)
    lines = []
    for (text, is_narrow), count in counts.items():
        who = "Each block" if count == total else f"{count} of {total} blocks"
        verb = "is" if count in (1, total) else "are"
        lines.append(f"{who}{f' {verb} narrower' if is_narrow else ''}: {text}.")
    return lines


def _describe_factors(group: Group) -> list[str]:
    """Describe the factored layers of a group, one line for each rank and kind."""
    kinds: dict[tuple[bool, bool, int], list[str]] = {}
    for layer, rank in group.ranks.items():
        has_basis = layer in group.bases and len(group.blocks) > 1
        kinds.setdefault((group.whole(layer), has_basis, rank), []).append(layer)
    return [
        f"{'residuals' if whole else 'products'} of rank {rank}{' with a basis of the group' if has_basis else ''}"
        f" {'added to' if whole else 'in place of'} the matrices of {', '.join(layers)}"
        for (whole, has_basis, rank), layers in kinds.items()
    ]


def _describe_widths(groups: Sequence[Group]) -> str:
    """Describe the range of widths of narrow MLPs and heads; empty if no group is narrow."""
    hidden, qk, v = (_range(groups, field) for field in ("hidden", "qk", "v"))
    parts = [f"{_count(hidden, 'hidden neuron')}"] if hidden else []
    if qk or v:
        uses = [(width, use) for width, use in ((qk, "queries and keys"), (v, "values")) if width]
        (first, use), *rest = uses
        heads = [f"{_count(first, 'channel')} for {use}", *(f"{width} for {use}" for width, use in rest)]
        parts.append(f"per head, {' and '.join(heads)}")
    return "; ".join(parts)


def _range(groups: Sequence[Group], field: str) -> str:
    """Return the range of a width: `32`, or `32–64`; empty if no group has it."""
    widths = {width for group in groups if (width := getattr(group.widths, field)) is not None}
    return "–".join(dict.fromkeys((str(min(widths)), str(max(widths))))) if widths else ""


def _count(number: int | str, noun: str) -> str:
    return f"{number} {noun}" if str(number) == "1" else f"{number} {noun}s"
