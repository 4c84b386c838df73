"""The report as data, and as JSON.

The bounds of the fields are checked when a report is read from a file, not when one is built.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from vitcompress.distill.log import TrainLog
from vitcompress.measure.results import Accuracy, Baseline, Speed
from vitcompress.plans.bounds import MAX_BLOCKS, MAX_ENTRIES, Text, Texts
from vitcompress.plans.model import Group, Size

SCHEMA_VERSION = 1
_NumBlocks = Annotated[int, Field(ge=1, le=MAX_BLOCKS)]


@dataclass(frozen=True)
class Parent:
    """A file that the result was made from.

    Attributes:
        name: of the file.
        sha256: of its bytes, as `sha256sum` prints it.
        command: that made it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Text
    sha256: Text
    command: Text


@dataclass(frozen=True)
class Report:
    """What went in, what came out, and how it was made.

    Attributes:
        schema_version: of this structure; a change that breaks readers raises it.
        model: name of the source.
        family: of the source.
        groups: number of blocks that share one set of weights, in order.
        transforms: what each block has of its own.
        size: parameters, bytes and multiply-accumulates.
        accuracy: None if there were no images to measure on.
        speed: latency; None if it was not measured.
        train: what training did.
        data: name of the training images; None if there were none.
        versions: of the packages.
        command: that made the result; empty if it was made from Python.
        notes: what the numbers do not say.
        before: accuracy before fine-tuning; None without fine-tuning, or if not measured.
        lineage: the files that the result was made from, oldest first.
        store: how the file holds the student.
        baselines: the whole teacher in fewer bits, on the same images; empty if not measured.
        made_of: the groups in full, with ranks and widths of their layers; empty in older reports.
        why: what a search chose the plan from, one line each, best first; empty without one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

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


@dataclass(frozen=True)
class Result:
    """A file to show.

    Attributes:
        name: of the file.
        file_bytes: size of the file on disk.
        report: in the file.
        recipe: in the file, as plain JSON values; they are not checked.
        classes: names of the model's classes, in order; empty if they are not known.
    """

    name: str
    file_bytes: int
    report: Report
    recipe: Mapping[str, Any]
    classes: Sequence[str] = ()


@functools.cache
def adapter(kind: type) -> TypeAdapter[Any]:
    """Return what validates and serializes the values of a type."""
    return TypeAdapter(kind)


def to_json(value: Any) -> dict[str, Any]:
    """Return a dataclass, like a report or a part of it, as plain JSON values."""
    kind: Any = type(value)
    tree: dict[str, Any] = adapter(kind).dump_python(value, mode="json")
    return tree
