"""The report for people: on the terminal and as Markdown, from the same rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitcompress.measure.results import Accuracy
from vitcompress.plans.model import Group, Plan, Size
from vitcompress.report.model import Report
from vitcompress.report.picture import alt_text, draw, points_of

Row = tuple[str, str, str, str]
_MOST_KINDS = 3  # of narrow blocks that are named one by one
_TEMPLATES = Environment(
    loader=PackageLoader("vitcompress.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    autoescape=False,  # Markdown, not HTML
)  # fmt: skip


def cell(text: str) -> str:
    """Text that stays in its cell and on its line of Markdown, and is no link, picture, code or HTML."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(re.sub(r"[\\`\[\]!|]", r"\\\g<0>", plain).split())


_TEMPLATES.filters["cell"] = cell


def print_report(report: Report, console: Console) -> None:
    """Print the report as a table."""
    _title(console, report.model, report.groups, report.made_of)
    table = Table("")
    for column in ("teacher", "student", "change"):
        table.add_column(column, justify="right")
    for row in rows(report):
        table.add_row(*map(escape, row))
    console.print(table)
    if report.baselines:
        compared = Table(*baseline_columns(report)[:1])
        for column in baseline_columns(report)[1:]:
            compared.add_column(column, justify="right")
        for cells in baseline_rows(report):
            compared.add_row(*map(escape, cells))
        console.print(compared)
    for line in remarks(report):
        console.print(line, markup=False, emoji=False, highlight=False)


def print_plan(plan: Plan, name: str, console: Console) -> None:
    """Print what shares with what, and what remains."""
    _title(console, name, [len(group.blocks) for group in plan.groups], plan.groups)
    table = Table("group", "donor", "blocks", *([] if all(group.is_plain for group in plan.groups) else ["made of"]))
    for number, group in enumerate(plan.groups):
        cells = [str(number), group.donor, ", ".join(block.rpartition(".")[2] for block in group.blocks)]
        more = [made_of(group)] if len(table.columns) > len(cells) else []
        table.add_row(*map(escape, (*cells, *more)))
    console.print(table)
    shared = sorted({name for group in plan.groups if len(group.blocks) > 1 for name in _shared(group)})
    console.print(f"shared in each group: {', '.join(shared) or 'nothing'}", markup=False, highlight=False)
    console.print(
        f"own in each block:    {', '.join(['everything else', *plan.transforms])}", markup=False, highlight=False
    )
    for line in (*kinds(plan.groups), *reasons(plan.why)):
        console.print(line, markup=False, highlight=False)
    sizes = Table("", "teacher", "student", "change")
    for row in size_rows(plan.size):
        sizes.add_row(*map(escape, row))
    console.print(sizes)


def print_options(options: Sequence[Mapping[str, Any]], name: str, console: Console) -> None:
    """Print what each option would cost, as `pipeline.sensitivities` gives it: a line per blocks, part and kind."""
    lines: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for option in options:
        numbers = [block.rpartition("blocks.")[2] for block in option["blocks"]]
        blocks = option["blocks"][0].rpartition("blocks.")[0] + "–".join(dict.fromkeys((numbers[0], numbers[-1])))
        lines.setdefault((blocks, option["part"], option["kind"]), []).append(option)
    table = Table("blocks", "part", "kind", "width or rank: nats of KL per image, parameters saved")
    for (blocks, part, kind), found in lines.items():
        marks = (f"{o['dial'] or 'whole'}: {o['cost']:.3g}, −{o['saved_params']:,}" for o in found)
        table.add_row(*map(escape, (blocks, part, kind, " · ".join(marks))))
    console.print(f"{name}: what each option alone does to the predictions", style="bold", markup=False)
    console.print(table)


def print_accuracy(accuracy: Accuracy, console: Console) -> None:
    """Print what was measured on one set of images."""
    table = Table("", "teacher", "student", "change")
    for row in _accuracy_rows(accuracy):
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(_accuracy_remark(accuracy), markup=False, highlight=False)


def to_markdown(report: Report, *, picture: str | None = None) -> str:
    """The report as a Markdown page.

    Args:
        report: what to lay out.
        picture: name of the file beside the page that `to_svg` was written to; None where there is none.
    """
    plan = [*kinds(report.made_of), *reasons(report.why)]
    return _TEMPLATES.get_template("report.md.j2").render(
        report=report,
        sharing=sharing(report.groups, report.made_of),
        rows=rows(report),
        remarks=[line for line in remarks(report) if line not in plan],
        plan=plan,
        fence=max(["```", *(f"{run}`" for run in re.findall("`+", report.command))], key=len),
        columns=baseline_columns(report),
        baselines=baseline_rows(report),
        picture=picture and quote(picture),
        shown=alt_text(points_of(report)),
    )


def to_svg(report: Report) -> str | None:
    """Size against top-1 of the models in a report, as SVG; None where fewer than two have a top-1."""
    points = points_of(report)
    return draw(points, report.model) if len(points) > 1 else None


def rows(report: Report) -> list[Row]:
    """What both renderings show: name, teacher, student, change."""
    return [*size_rows(report.size), *accuracy_rows(report), *speed_rows(report)]


def accuracy_rows(report: Report) -> list[Row]:
    """Accuracies, before fine-tuning too; nothing where none was measured."""
    found: list[Row] = []
    if report.before and report.before.student_top1 is not None:
        found.append(("top-1 before fine-tuning", "", _percent(report.before.student_top1), ""))
    return [*found, *(_accuracy_rows(report.accuracy) if report.accuracy else [])]


def speed_rows(report: Report) -> list[Row]:
    """Latencies by batch size; nothing where they were not measured."""
    if report.speed is None:
        return []
    return [
        (
            f"latency, batch {batch}",
            f"{teacher:.1f} ms",
            f"{report.speed.student_ms[batch]:.1f} ms",
            _pace(report.speed.student_ms[batch] / teacher),
        )
        for batch, teacher in report.speed.teacher_ms.items()
    ]


def _pace(ratio: float) -> str:
    """`2.04× slower`, of the student's time over the teacher's."""
    return f"{ratio:.2f}× slower" if ratio >= 1 else f"{1 / ratio:.2f}× faster"


def size_rows(size: Size) -> list[Row]:
    """Parameters, bytes and multiply-accumulates."""
    fewer = _times(size.params_ratio, "fewer", "more")
    smaller = _times(size.bytes_ratio, "smaller", "larger")
    macs = "" if size.macs_ratio is None else _times(size.macs_ratio, "fewer", "more")
    return [
        ("parameters", f"{size.teacher_params:,}", f"{size.student_params:,}", fewer),
        ("tensors", megabytes(size.teacher_bytes), megabytes(size.student_bytes), smaller),
        ("MACs per image", _macs(size.teacher_macs), _macs(size.student_macs), macs),
    ]


def _macs(count: int | None) -> str:
    """Multiply-accumulates in the unit that suits them: `17.56 G`."""
    if count is None:
        return "unknown"
    unit, factor = ("G", 1e9) if count >= 1e9 else ("M", 1e6)
    return f"{count / factor:.2f} {unit}"


def _times(ratio: float, less: str, more: str) -> str:
    """`1.25× fewer`; where there is more, as transformations need some, by the factor that is above one."""
    return f"{ratio:.2f}× {less}" if ratio >= 1 else f"{1 / ratio:.2f}× {more}"


def _accuracy_rows(accuracy: Accuracy) -> list[Row]:
    found: list[Row] = []
    if accuracy.student_top1 is not None:
        change = "" if accuracy.top1_drop is None else _points(accuracy.top1_drop)
        found.append(("top-1", _percent(accuracy.teacher_top1), _percent(accuracy.student_top1), change))
        found.append(("top-5", _percent(accuracy.teacher_top5), _percent(accuracy.student_top5), ""))
    if accuracy.agreement is not None:
        found.append(("agreement with the teacher", "", _percent(accuracy.agreement), ""))
    if accuracy.feature_cosine is not None:
        found.append(("cosine similarity of features", "", f"{accuracy.feature_cosine:.4f}", ""))
    return found


def baseline_columns(report: Report) -> list[str]:
    """Heads of the table that sets the student beside its teacher in fewer bits."""
    return ["", "parameters", "tensors", _MEASURES[_measure_of(report)], "change"]


def baseline_rows(report: Report) -> list[tuple[str, ...]]:
    """The student, and the teacher in fewer bits, on the same images; nothing where that was not measured."""
    if not report.baselines or report.accuracy is None:
        return []
    size, found, measure = report.size, report.accuracy, _measure_of(report)
    own = _own(found)
    name = "student" if report.store == "source" else f"student {report.store}"
    every = [(name, size.student_params, size.student_bytes, own[measure], found.top1_drop)]
    every += [(b.name, b.params, b.bytes, getattr(b, measure), b.top1_drop) for b in report.baselines]
    return [
        (
            name,
            f"{params:,}",
            megabytes(num_bytes),
            "–" if value is None else f"{value:.4f}" if measure == "feature_cosine" else _percent(value),
            "" if drop is None else _points(drop),
        )
        for name, params, num_bytes, value, drop in every
    ]


_MEASURES = {
    "top1": "top-1",
    "agreement": "agreement with the teacher",
    "feature_cosine": "cosine similarity of features",
}


def _measure_of(report: Report) -> str:
    """The field of a baseline that its images and its model give."""
    return next((name for b in report.baselines for name in _MEASURES if getattr(b, name) is not None), "top1")


def _points(drop: float) -> str:
    """A drop as a change of accuracy; none has no sign."""
    return f"{-drop:+.2f} points" if round(drop, 2) else "0.00 points"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"


def remarks(report: Report) -> list[str]:
    """The sentences under the table."""
    lines = [*untrained_is_better(report), *kinds(report.made_of), *reasons(report.why)]
    if report.accuracy:
        lines.append(_accuracy_remark(report.accuracy))
    if report.train.steps:
        train = report.train
        verb = "Trained on labels" if train.teacher is None else "Distilled"
        lines.append(
            f"{verb} for {train.steps:,} steps, {train.images:,} images in {train.seconds:.0f} s "
            f"({_rate(train.images_per_second)} images/s), on {report.data}."
        )
    else:
        lines.append("Converted without training.")
    if report.lineage:
        parent = report.lineage[-1]
        lines.append(f"Fine-tuned from {parent.name} (SHA-256 {parent.sha256[:12]}…), made by: {parent.command}")
    if report.speed:
        lines.append(f"Latency: median, {report.speed.threads} threads, {report.speed.device}.")
    return [*lines, *report.notes]


def _rate(per_second: float) -> str:
    return f"{per_second:.0f}" if per_second >= 10 else f"{per_second:.2g}"


def untrained_is_better(report: Report) -> list[str]:
    """A sentence where the teacher in fewer bits beats the student in bytes and in what is measured; else nothing."""
    measure, size = _measure_of(report), report.size.student_bytes
    own = _own(report.accuracy)[measure] if report.accuracy else None
    found = [(value, b) for b in report.baselines if b.bytes < size and (value := getattr(b, measure)) is not None]
    if own is None or not any(value > own for value, _ in found):
        return []
    value, best = max(found, key=lambda pair: (pair[0], -pair[1].bytes))
    before, after = (f"{each:.4f}" if measure == "feature_cosine" else _percent(each) for each in (value, own))
    return [
        f"The {best.name}, without training, is smaller than this student ({megabytes(best.bytes)} against "
        f"{megabytes(size)}) and has a better {_MEASURES[measure]} ({before} against {after})."
    ]


def _own(found: Accuracy) -> dict[str, float | None]:
    """What baselines are compared by, of the student."""
    return {"top1": found.student_top1, "agreement": found.agreement, "feature_cosine": found.feature_cosine}


def _accuracy_remark(accuracy: Accuracy) -> str:
    text = f"Measured on {accuracy.num_images:,} images: {accuracy.data}."
    if accuracy.top1_drop_ci95 is not None:
        low, high = accuracy.top1_drop_ci95
        text += f" 95 % interval of the top-1 drop: {low:.2f} to {high:.2f} points (paired)."
    if accuracy.feature_cosine is not None:
        text += " The model has no classes: its features are compared with the teacher's."
    elif accuracy.student_top1 is None:
        text += " They have no labels, so this is agreement with the teacher, not accuracy."
    if accuracy.num_skipped:
        text += f" {accuracy.num_skipped:,} unreadable images were skipped."
    return text


def kinds(groups: Sequence[Group]) -> list[str]:
    """What layers are made of, where they are not whole matrices of the teacher's widths: a sentence for each kind."""
    found: dict[str, int] = {}
    narrow = {text for group in groups for text in _widths([group])}
    if len(narrow) > _MOST_KINDS:  # of a search: one line says more than a dozen
        together = [group for group in groups if _widths([group])]
        found = dict.fromkeys(_widths(together), sum(len(group.blocks) for group in together))
    for group in groups:
        for text in (*_factors(group), *(_widths([group]) if len(narrow) <= _MOST_KINDS else ())):
            found[text] = found.get(text, 0) + len(group.blocks)
    total = sum(len(group.blocks) for group in groups)
    return [
        f"{'Each block' if count == total else f'{count} of {total} blocks'}: {text}." for text, count in found.items()
    ]


def reasons(why: Sequence[str]) -> list[str]:
    """Why a plan was chosen, a sentence for each that was weighed; nothing where it was given."""
    return [f"{'Chosen' if number == 0 else 'Weighed against'}: {line}." for number, line in enumerate(why)]


def _factors(group: Group) -> list[str]:
    """The layers that have factors, by what they are added to, whose they are, and their rank."""
    alike: dict[tuple[bool, bool, int], list[str]] = {}
    for layer, rank in group.ranks.items():
        shared = layer in group.bases and len(group.blocks) > 1
        alike.setdefault((group.whole(layer), shared, rank), []).append(layer)
    return [
        f"{'residuals' if whole else 'products'} of rank {rank}{' with a basis of the group' if shared else ''}"
        f" {'added to the matrices' if whole else 'in the place of the matrices'} of {', '.join(layers)}"
        for (whole, shared, rank), layers in alike.items()
    ]


def _widths(groups: Sequence[Group]) -> list[str]:
    """How wide the MLPs and the heads of narrow blocks are, from the narrowest to the widest."""
    names = {
        "hidden": "hidden neurons",
        "qk": "channels of queries and keys per head",
        "v": "channels of values per head",
    }
    given = []
    for field, name in names.items():
        counts = {count for group in groups if (count := getattr(group.widths, field)) is not None}
        if counts:
            given.append(f"{'–'.join(dict.fromkeys((str(min(counts)), str(max(counts)))))} {name}")
    return [f"narrow, {', '.join(given)}"] if given else []


def made_of(group: Group) -> str:
    """A few words on how a group's blocks are made; empty where as the teacher's."""
    widths = [f"{name} {count}" for name in ("hidden", "qk", "v") if (count := getattr(group.widths, name))]
    ranks: dict[str, list[str]] = {}
    for layer, rank in group.ranks.items():
        kind = "basis" if layer in group.bases else "rank"
        ranks.setdefault(f"{'+' if group.whole(layer) else ''}{kind} {rank}", []).append(layer)
    return ", ".join([*widths, *(f"{', '.join(layers)}: {rank}" for rank, layers in ranks.items())])


def _shared(group: Group) -> list[str]:
    """Names, inside a block, of what all blocks of a group use; a basis is one of a layer's two factors."""
    bases = [f"{layer} (basis)" for layer in group.bases]
    return [*group.shared, *bases]


def _title(console: Console, name: str, groups: Sequence[int], made_of: Sequence[Group]) -> None:
    """The line above a table; a name may hold what rich would take for markup."""
    console.print(f"{name}: {sharing(groups, made_of)}", style="bold", markup=False, emoji=False, highlight=False)


def sharing(groups: Sequence[int], made_of: Sequence[Group] = ()) -> str:
    """`12 blocks in groups of 5+5+2`, and whether other groups' blocks run between a group's own."""
    numbers = [[int(block.rpartition(".")[2]) for block in group.blocks] for group in made_of]
    in_turn = any(last - first >= len(of) for of in numbers for first, last in [(of[0], of[-1])])
    return _groups(groups) + (", taken in turn" if in_turn else "")


def _groups(groups: Sequence[int]) -> str:
    if len(groups) > 1 and set(groups) == {1}:
        return f"{len(groups)} blocks that share nothing"
    if len(groups) > 1 and len(set(groups)) == 1:
        return f"{sum(groups)} blocks in {len(groups)} groups of {groups[0]}"
    return (
        f"{sum(groups)} blocks in groups of {'+'.join(map(str, groups))}"
        if len(groups) > 1
        else (f"{groups[0]} blocks in one group")
    )


def megabytes(num_bytes: int) -> str:
    """Bytes as MB, 10⁶."""
    return f"{num_bytes / 1e6:.2f} MB"
