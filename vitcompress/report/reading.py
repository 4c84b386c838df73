"""Read a report from a file, and refuse one that cannot be true: anybody can write a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from vitcompress.errors import ArtifactError
from vitcompress.plans.bounds import MAX_BLOCKS
from vitcompress.report.model import SCHEMA_VERSION, Report, adapter


def from_json(tree: Mapping[str, Any]) -> Report:
    """Return the report that `to_json` wrote.

    Args:
        tree: plain JSON values.

    Raises:
        ArtifactError: the schema is another, or a field has an implausible value.
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
