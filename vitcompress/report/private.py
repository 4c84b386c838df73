"""Remove names of the user's folders from what is shared: `/home/me/images` becomes `…/images`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitcompress.report.model import Report

_FOLDERS = re.compile(r"(?<![\w.])(?:~[^/\s~]*|\.\.?)?/(?:[^/\n'\"]+/)+|(?<!\w)[A-Za-z]:\\(?:[^\\\n'\"]+\\)*")


def without_places(value: Any) -> Any:
    """Return text, or JSON values with text in them, with `…/` for the folders of each path."""
    if isinstance(value, str):
        return _FOLDERS.sub("…/", value)
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    return [without_places(item) for item in value] if isinstance(value, (list, tuple)) else value


def shareable(report: Report) -> Report:
    """Return a report that names no folders except in the commands, which say how it was made."""
    accuracy = report.accuracy and replace(report.accuracy, data=without_places(report.accuracy.data))
    before = report.before and replace(report.before, data=without_places(report.before.data))
    teacher = without_places(report.train.teacher)
    return replace(
        report, model=without_places(report.model), accuracy=accuracy, before=before, data=without_places(report.data),
        notes=tuple(map(without_places, report.notes)), train=replace(report.train, teacher=teacher),
    )  # fmt: skip
