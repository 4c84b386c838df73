"""What of a result may be passed on?  Everything but where on the user's machine things lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitcompress.report.model import Report

_PLACE = re.compile(r"(?<![\w.])(?:~[^/\s~]*|\.\.?)?/(?:[^/\n'\"]+/)+|(?<!\w)[A-Za-z]:\\(?:[^\\\n'\"]+\\)*")


def without_places(value: Any) -> Any:
    """The same without the folders in it: `/home/me/images` is `…/images`.

    Args:
        value: text, or plain JSON values that hold some.
    """
    if isinstance(value, str):
        return _PLACE.sub("…/", value)
    if isinstance(value, Mapping):
        return {key: without_places(each) for key, each in value.items()}
    return [without_places(each) for each in value] if isinstance(value, (list, tuple)) else value


def shareable(report: Report) -> Report:
    """A report that names no folder but in the commands, which say how it was made."""
    accuracy = report.accuracy and replace(report.accuracy, data=without_places(report.accuracy.data))
    before = report.before and replace(report.before, data=without_places(report.before.data))
    teacher = without_places(report.train.teacher)
    return replace(
        report, model=without_places(report.model), accuracy=accuracy, before=before, data=without_places(report.data),
        notes=tuple(map(without_places, report.notes)), train=replace(report.train, teacher=teacher),
    )  # fmt: skip
