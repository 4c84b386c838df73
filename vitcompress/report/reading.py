"""Is this a report?  One that was read from a file, which anybody can write, is held against what can be in one.

The dataclasses do not ask themselves: a report that is made at the end of a long training is never refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vitcompress.distill.log import TrainLog
from vitcompress.errors import ArtifactError
from vitcompress.measure.results import Accuracy, Baseline, Speed
from vitcompress.plans.model import Size
from vitcompress.report.model import SCHEMA_VERSION, Report

_MOST_NUMBER = 1e15
_MOST_LETTERS = 1 << 16
_MOST_ENTRIES = {
    "baselines": 16,
    "loss_curve": 400,
    "made_of": 512,
    "groups": 512,
    "classes": 100,
    "confusions": 100,
    "lineage": 1024,
}
_MOST_OF_OTHERS = 4096
_BLOCK = re.compile(r"([A-Za-z0-9_]{1,64}\.){1,8}[0-9]{1,5}")
_RATIOS = (1e-9, 1e9)
_COUNTS = (1, _MOST_NUMBER)


def from_json(tree: Mapping[str, Any]) -> Report:
    """The report that `to_json` wrote.

    Raises:
        ArtifactError: of another schema, or with numbers or names that cannot be.
    """
    if tree.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"The report has schema {tree.get('schema_version')}; this vitcompress reads schema {SCHEMA_VERSION}.",
            hint="pip install --upgrade vitcompress",
        )
    try:
        report = TypeAdapter(Report).validate_python(dict(tree))
    except ValidationError as error:
        raise ArtifactError(f"The report is not of schema {SCHEMA_VERSION}: {error.errors()[0]['msg']}.") from error
    fault = next(itertools.chain(_of_any(tree), _of_blocks(report), _of_parts(report)), None)
    if fault:
        raise ArtifactError(f"The report cannot be: {fault}.")
    return report


def _of_any(value: Any, name: str = "") -> Iterator[str]:
    """What is beyond all bounds, whatever it means."""
    if isinstance(value, str) and len(value) > _MOST_LETTERS:
        yield f"{name} has {len(value):,} letters"
    elif isinstance(value, (int, float)) and not -_MOST_NUMBER <= value <= _MOST_NUMBER:
        yield f"{name} is beyond all bounds"
    elif isinstance(value, (list, tuple, Mapping)):
        if len(value) > _MOST_ENTRIES.get(name, _MOST_OF_OTHERS):
            yield f"{name} has {len(value):,} entries"
            return
        pairs = value.items() if isinstance(value, Mapping) else ((name, each) for each in value)
        for key, each in pairs:
            yield from _of_any(each, str(key)[:80])


def _of_blocks(report: Report) -> Iterator[str]:
    if not report.groups or min(report.groups) < 1 or sum(report.groups) > _MOST_ENTRIES["groups"]:
        yield "groups are no numbers of blocks"
    for group in report.made_of:
        if not all(_BLOCK.fullmatch(block) for block in group.blocks):
            yield "made_of names what is no block"


def _of_parts(report: Report) -> Iterator[str]:
    yield from _of_size(report.size)
    for accuracy in (report.accuracy, report.before):
        yield from _of_accuracy(accuracy) if accuracy else ()
    yield from _of_speed(report.speed) if report.speed else ()
    yield from _of_training(report.train)
    for baseline in report.baselines:
        yield from _of_baseline(baseline)


def _of_size(size: Size) -> Iterator[str]:
    for name in ("params", "bytes", "macs"):
        yield from _outside(f"{name}_ratio", getattr(size, f"{name}_ratio"), *_RATIOS)
        for whose in ("teacher", "student"):
            yield from _outside(f"{whose}_{name}", getattr(size, f"{whose}_{name}"), *_COUNTS)


def _of_accuracy(found: Accuracy) -> Iterator[str]:
    yield from _outside("num_images", found.num_images, *_COUNTS)
    yield from _outside("num_skipped", found.num_skipped, 0, _MOST_NUMBER)
    for name in ("teacher_top1", "student_top1", "teacher_top5", "student_top5", "agreement"):
        yield from _outside(name, getattr(found, name), 0, 100)
    yield from _outside("top1_drop", found.top1_drop, -100, 100)
    for row in found.classes:
        yield from _outside("num_images of a class", row.num_images, *_COUNTS)
        for hits in (row.teacher_hits, row.student_hits):
            yield from _outside("hits of a class", hits, 0, row.num_images)


def _of_speed(speed: Speed) -> Iterator[str]:
    if speed.teacher_ms.keys() != speed.student_ms.keys() or not all(
        re.fullmatch("[0-9]{1,9}", batch) for batch in speed.teacher_ms
    ):
        yield "teacher_ms and student_ms are not of the same batches"
    for latency in (*speed.teacher_ms.values(), *speed.student_ms.values()):
        yield from _outside("a latency", latency, 1e-9, 1e9)


def _of_training(train: TrainLog) -> Iterator[str]:
    for name in ("steps", "images", "skipped_images", "seconds", "images_per_second"):
        yield from _outside(name, getattr(train, name), 0, _MOST_NUMBER)
    if any(len(point) > 32 for point in train.loss_curve):
        yield "loss_curve has a point of too many losses"


def _of_baseline(baseline: Baseline) -> Iterator[str]:
    for name in ("params", "bytes"):
        yield from _outside(f"{name} of a baseline", getattr(baseline, name), *_COUNTS)
    for name in ("top1", "agreement"):
        yield from _outside(f"{name} of a baseline", getattr(baseline, name), 0, 100)


def _outside(name: str, value: float | None, least: float, most: float) -> Iterator[str]:
    if value is not None and not least <= value <= most:
        yield f"{name} cannot be {value:.6g}"
