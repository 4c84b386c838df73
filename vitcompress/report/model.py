"""The report as data, and as the JSON that is its one schema."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from vitcompress.distill.log import TrainLog
from vitcompress.measure.results import Accuracy, Baseline, Speed
from vitcompress.plans.model import Group, Size

SCHEMA_VERSION = 1


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Parent:
    """A file that the result was made from.

    Attributes:
        name: of the file.
        sha256: of its bytes, as `sha256sum` gives it.
        command: what was typed to make it.
    """

    name: str
    sha256: str
    command: str


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Report:
    """What went in, what came out, and how it was made.

    Attributes:
        schema_version: of this structure; a change that breaks readers raises it.
        model: the teacher's name.
        family: of the teacher.
        groups: how many blocks share one set of weights, in order.
        transforms: what each block has of its own.
        size: parameters, bytes and multiply-accumulates.
        accuracy: None where there were no images to measure on.
        speed: latency.
        train: what training did.
        data: the training images; None where there were none.
        versions: of the packages.
        command: what was typed.
        notes: what the numbers do not say.
        before: the student before it was fine-tuned; None where it was not, or could not be measured.
        lineage: the files it was made from, oldest first.
        store: how the file holds the student.
        baselines: the whole teacher in fewer bits, on the same images; empty where they were not measured.
        made_of: the groups in full, with the ranks and widths of their layers; empty in reports from before these.
        why: what a search chose the plan from, one line each, best first; empty where the plan was given.
    """

    schema_version: int
    model: str
    family: str
    groups: tuple[int, ...]
    transforms: tuple[str, ...]
    size: Size
    accuracy: Accuracy | None
    speed: Speed | None
    train: TrainLog
    data: str | None
    versions: dict[str, str]
    command: str
    notes: tuple[str, ...] = ()
    before: Accuracy | None = None
    lineage: tuple[Parent, ...] = ()
    store: str = "source"
    baselines: tuple[Baseline, ...] = ()
    made_of: tuple[Group, ...] = ()
    why: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
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
    """Return what validates and serializes a type of the report."""
    return TypeAdapter(kind)


def to_json(value: Any) -> dict[str, Any]:
    """Return a dataclass, like a report or a part of it, as plain JSON values."""
    tree: dict[str, Any] = adapter(type(value)).dump_python(value, mode="json")
    return tree
