"""Folders of the user's are not shared."""

from __future__ import annotations

import time

from vitcompress.report.private import without_places


def test_places_are_found_in_long_text_at_once() -> None:
    start = time.perf_counter()
    assert without_places("~" * 200_000 + "me/a/b").endswith("…/b")
    assert time.perf_counter() - start < 5
    assert without_places("--data=~me/a/b") == "--data=…/b"
