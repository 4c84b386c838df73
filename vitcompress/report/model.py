"""The report as data, written as JSON and read from it.

Anybody can write a file, so the bounds of the fields are checked when a report is read from JSON;
they are not checked when a report is built.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from vitcompress.distill.log import TrainLog
from vitcompress.errors import ArtifactError
from vitcompress.measure.results import Accuracy, Baseline, Speed
from vitcompress.plans.bounds import MAX_BLOCKS, MAX_ENTRIES, Amount, Text, Texts
from vitcompress.plans.model import Group, Size

SCHEMA_VERSION = 1
_NumBlocks = Annotated[int, Field(ge=1, le=MAX_BLOCKS)]


@dataclass(frozen=True)
class Parent:
    """A file or a model that the result was made from.

    Attributes:
        name: name of the file, or of the model of timm.
        sha256: hash of the file's bytes, as `sha256sum` prints it, or of the model's tensors.
        command: command that made the file; empty for a model.
    """

    name: Text
    sha256: Text
    command: Text


@dataclass(frozen=True)
class Report:
    """What went in, what came out, and how it was made.

    Attributes:
        schema_version: version of this structure; a change that breaks readers increases it.
        model: name of the source.
        family: family of the source.
        groups: number of blocks that share one set of weights, in order.
        transforms: transformations added to each block.
        size: parameters, bytes and multiply-accumulates.
        accuracy: None if there were no images to measure on.
        speed: latency; None if it was not measured.
        train: counters and loss curve of the training.
        data: name of the training images; None if there were none.
        versions: versions of the packages.
        command: command that made the result; empty if it was made from Python.
        notes: remarks on the numbers.
        before: accuracy before fine-tuning; None without fine-tuning, or if not measured.
        lineage: the files that the result was made from, oldest first.
        store: number format of the file.
        baselines: the whole teacher in fewer bits, on the same images; empty if not measured.
        made_of: the groups in full, with what is changed in their layers; empty in older reports.
        why: plans that a search chose from, one line each, best first; empty without a search.
        preprocessing: size, resizing, crop and normalization of images; empty in older reports.
        outputs: kind of the model's outputs: `classes`, `multi_label`, `regression` or `features`
            (of a model without a head); None in older reports.
        seconds: time that each stage of the command took: loading, search, start, training,
            evaluation; without writing; empty in older reports.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # also for the dataclasses in it

    schema_version: int
    model: Text
    family: Text
    groups: Annotated[tuple[_NumBlocks, ...], Field(min_length=1, max_length=MAX_BLOCKS)]
    transforms: Texts
    size: Size
    accuracy: Accuracy | None
    speed: Speed | None
    train: TrainLog
    data: Text | None
    versions: Annotated[dict[Text, Text], Field(max_length=MAX_ENTRIES)]
    command: Text
    notes: Texts = ()
    before: Accuracy | None = None
    lineage: Annotated[tuple[Parent, ...], Field(max_length=1024)] = ()
    store: Text = "source"
    baselines: Annotated[tuple[Baseline, ...], Field(max_length=16)] = ()
    made_of: Annotated[tuple[Group, ...], Field(max_length=MAX_BLOCKS)] = ()
    why: Texts = ()
    preprocessing: Text = ""
    outputs: Text | None = None
    seconds: Annotated[dict[Text, Amount], Field(max_length=16)] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A file to show.

    Attributes:
        name: name of the file.
        file_bytes: size of the file on disk.
        report: report in the file.
        recipe: recipe in the file, as plain JSON values; they are not checked.
        classes: names of the model's classes, in order; empty if they are not known.
    """

    name: str
    file_bytes: int
    report: Report
    recipe: Mapping[str, Any]
    classes: Sequence[str] = ()


@functools.cache
def adapter(kind: type) -> TypeAdapter[Any]:
    """Return pydantic's reader and writer of a type."""
    return TypeAdapter(kind)


def to_json(value: Any) -> dict[str, Any]:
    """Return a dataclass, like a report or a part of it, as plain JSON values."""
    kind: Any = type(value)
    tree: dict[str, Any] = adapter(kind).dump_python(value, mode="json")
    return tree


def from_json(tree: Mapping[str, Any]) -> Report:
    """Return the report that `to_json` wrote.

    Args:
        tree: plain JSON values.

    Raises:
        ArtifactError: another schema, or a field with an implausible value.
    """
    if tree.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"The report has schema {tree.get('schema_version')}; this vitcompress reads schema {SCHEMA_VERSION}.",
            hint="pip install --upgrade vitcompress",
        )
    try:
        report: Report = adapter(Report).validate_python(dict(tree))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(str(name)[:80] for name in first["loc"])
        raise ArtifactError(f"Implausible report: {field}: {first['msg']}.") from error
    for fault in _contradictions(report):
        raise ArtifactError(f"Implausible report: {fault}.")
    return report


def _contradictions(report: Report) -> Iterator[str]:
    """Find fields that do not fit together."""
    if sum(report.groups) > MAX_BLOCKS:
        yield f"groups: more than {MAX_BLOCKS} blocks"
    if report.speed and report.speed.teacher_ms.keys() != report.speed.student_ms.keys():
        yield "speed: teacher_ms and student_ms have different batch sizes"
    for accuracy in filter(None, (report.accuracy, report.before)):
        for row in accuracy.classes:
            if max(row.teacher_hits or 0, row.student_hits) > row.num_images:
                yield f"accuracy.classes: class {row.index} has more hits than images"
