"""Streams write what their encoding has, and something similar for the rest."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import draw_image
from vitcompress.runtime.encoding import encode_what_can_be, encodes

TEXT = "1.15× – “naïve” 66,915 → 40,167 … ≥ ½ ┏━┳┓│ █ 日 \udcff"


def written(encoding: str, text: str, errors: str = "strict") -> bytes:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    encode_what_can_be(stream, None, io.StringIO())
    stream.write(text)
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue()


@pytest.mark.parametrize(
    ("encoding", "errors", "expected"),
    [
        ("ascii", "strict", '1.15x - "na?ve" 66,915 -> 40,167 ... >= 1/2 +-++| # ? ?'),
        ("ascii", "backslashreplace", '1.15x - "na?ve" 66,915 -> 40,167 ... >= 1/2 +-++| # ? ?'),
        ("cp1251", "strict", "1.15x – “na?ve” 66,915 -> 40,167 … >= 1/2 +-++| # ? ?"),
        ("cp1252", "strict", "1.15× – “naïve” 66,915 -> 40,167 … >= ½ +-++| # ? ?"),
        ("cp437", "strict", '1.15x - "naïve" 66,915 -> 40,167 ... ≥ ½ +-++│ █ ? ?'),
        ("utf-8", "strict", TEXT.replace("\udcff", "?")),
    ],
)
def test_what_cannot_be_encoded_becomes_similar(encoding: str, errors: str, expected: str) -> None:
    assert written(encoding, TEXT, errors).decode(encoding) == expected


def test_names_of_files_keep_their_bytes_where_they_can() -> None:
    assert written("utf-8", "a\udcff", "surrogateescape") == b"a\xff"


def test_whether_a_stream_encodes_a_text() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    assert (encodes(stream, "×"), encodes(stream, "→"), encodes(io.StringIO(), "→")) == (True, False, True)


def run(encoding: str, *words: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    command = [sys.executable, "-m", "vitcompress", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", pytest.param("cp437", marks=pytest.mark.thorough)])
def test_a_report_and_a_missed_gate_are_told_in_any_encoding(encoding: str, mini: Path) -> None:
    shown = run(encoding, "report", mini)
    assert (shown.returncode, shown.stderr) == (0, b"")
    text = shown.stdout.decode(encoding)
    assert "x fewer" in text
    assert "+-" in text  # a table
    missed = run(encoding, "check", mini, "--min-ratio", 50)
    assert (missed.returncode, missed.stdout) == (3, b"")
    assert missed.stderr.decode(encoding).startswith("missed: ")


@pytest.mark.thorough
def test_results_for_programs_stay_whole(mini: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ended = run("ascii", "report", mini, "--json", "--html", page)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == json.loads(run("utf-8", "report", mini, "--json").stdout)
    assert "×" in page.read_text(encoding="utf-8")
    images = tmp_path / "Fußgänger"
    draw_image(images / "a.png", 0)
    recipe = run("ascii", "compress", "deit_tiny_patch16_224", "--data", images, "--share", 2, "--dry-run")
    assert recipe.returncode == 0, recipe.stderr
    assert yaml.safe_load(recipe.stdout)["data"]["data"] == str(images)


@pytest.mark.thorough
def test_help_and_errors_are_told_in_ascii() -> None:
    for words, code in ((["plan", "--help"], 0), (["plan", "--hlp"], 2), (["plan", "dèit"], 2)):
        ended = run("ascii", *words)
        assert ended.returncode == code
        assert b"Traceback" not in ended.stderr
        (ended.stdout + ended.stderr).decode("ascii")
