"""Several files side by side."""

from __future__ import annotations

from dataclasses import replace

from tests.report.pages import assert_safe
from tests.report.samples import RESULT, UNLABELLED
from vitcompress.report.compare import cautions, compared_html, compared_rows


def test_files_stand_side_by_side_and_cautions_say_what_cannot_be_compared() -> None:
    other = replace(RESULT, report=UNLABELLED)
    rows = {row[0]: row[1:] for row in compared_rows([RESULT, other])}
    assert rows["top-1"] == ["84.50 % (-1.50 points)", "–"]
    assert rows["agreement with the teacher"] == ["92.00 %", "88.00 %"]
    assert cautions([RESULT, RESULT]) == []
    squashed = replace(RESULT, report=replace(RESULT.report, preprocessing="squash"))
    assert cautions([squashed, replace(squashed, report=replace(RESULT.report, preprocessing="center"))]) == [
        "Images are prepared in different ways: center / squash."
    ]
    assert "different images: flat; val." in cautions([RESULT, other])[0]
    html = compared_html([RESULT, RESULT])
    assert "mini.safetensors (2)" in html
    assert_safe(html)
