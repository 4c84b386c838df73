"""Events are the lines of JSON of docs/how-to/ci.md, however a command ends."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from tests.conftest import Vitcompress
from vitcompress.cli.output import reporting
from vitcompress.runtime.console import EVENTS, LOG_VERSION, STARTED_VARIABLE, JsonLog, Reporter

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "ci.md"
FAST = ("--share", 2, "--steps", 3, "--batch-size", 4, "--num-workers", 0, "--device", "cpu", "--no-baselines")


def events(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert line["log_version"] == LOG_VERSION
        assert line.keys() == {"log_version", "event", "time", *EVENTS[line["event"]]}
    return lines


def test_a_run_and_its_result(vitcompress: Vitcompress, teacher: Sequence[str], images: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "mini.safetensors", tmp_path / "log.jsonl"
    words = ("compress", *teacher, "--data", images, *FAST, "--out", out, "--quiet", "--log-json", log)
    ended = vitcompress(*words, "--max-drop", -101)
    assert (ended.code, ended.err.count("missed:"), ended.err.count("\n")) == (3, 1, 1)
    found = events(log.read_text(encoding="utf-8"))
    by_name = {line["event"]: line for line in found}
    assert (found[0]["event"], found[-1]["event"]) == ("start", "end")
    assert found[0]["command"].startswith("vitcompress compress vit_tiny")
    report = json.loads((tmp_path / "mini.report.json").read_text(encoding="utf-8"))
    assert by_name["plan"]["groups"] == report["groups"] == [2, 2]
    assert by_name["plan"]["size"]["student_params"] == report["size"]["student_params"]
    assert by_name["step"]["done"] == 1
    assert by_name["step"]["loss"] > 0
    assert by_name["evaluate"]["accuracy"] == report["accuracy"]
    assert (by_name["wrote"]["file"], by_name["wrote"]["bytes"]) == (str(out), out.stat().st_size)
    assert len(by_name["gate"]["missed"]) == 1
    assert by_name["end"]["exit_code"] == 3
    again = vitcompress("check", out, "--min-ratio", 1, "--log-json", log)
    assert (again.code, [line["event"] for line in events(log.read_text())]) == (0, ["start", "gate", "end"])


def test_on_stderr_there_is_nothing_else(vitcompress: Vitcompress, mini: Path, images: Path) -> None:
    ended = vitcompress("evaluate", mini, "--data", images / "val", "--num-workers", 0, "--log-json", "-")
    assert ended.code == 0
    kinds = [kind for kind, _ in itertools.groupby(line["event"] for line in events(ended.err))]
    assert kinds == ["start", "note", "progress", "evaluate", "end"]
    missed = vitcompress("check", mini, "--min-ratio", 50, "--log-json", "-")
    assert (missed.code, [line["event"] for line in events(missed.err)]) == (3, ["start", "gate", "end"])


def test_processes_that_a_command_starts_write_to_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"log_version": 1, "event": "of an older run"}\n')
    with reporting(str(log), quiet=True) as reporter:
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "0")
            patch.setenv(STARTED_VARIABLE, "0")
            with reporting(str(log), quiet=True) as below:
                below.say("in a process of its own")
            patch.setenv("RANK", "1")
            with reporting(str(log), quiet=True) as silent:
                silent.say("in another")
        reporter.say("all have ended")
    found = events(log.read_text())
    assert [line["event"] for line in found] == ["start", "note", "note", "end"]
    assert [line["text"] for line in found[1:3]] == ["in a process of its own", "all have ended"]


def test_a_mistake_is_an_event(vitcompress: Vitcompress, tmp_path: Path) -> None:
    ended = vitcompress("plan", "deit_tiny", "--share", 0, "--log-json", "-")
    _, error, end = events(ended.err)
    assert (ended.code, end["exit_code"], error["kind"]) == (2, 2, "RecipeError")
    assert "--share 0" in error["message"]
    ended = vitcompress("plan", "deit_tiny", "--share", 0, "--log-json", tmp_path / "log")
    assert ended.code == 2
    assert "Error: --share 0" in ended.err
    assert [line["event"] for line in events((tmp_path / "log").read_text())] == ["start", "error", "end"]


def test_a_log_that_cannot_be_written(vitcompress: Vitcompress, tmp_path: Path) -> None:
    ended = vitcompress("plan", "deit_tiny", "--log-json", tmp_path / "nowhere" / "log")
    assert (ended.code, ended.out) == (2, "")
    assert "--log-json" in ended.err
    assert "No such file" in ended.err


def test_numbers_that_json_does_not_have() -> None:
    stream = io.StringIO()
    reporter = Reporter(quiet=True, log=JsonLog(stream))
    with reporter.training() as ticker:
        ticker.step(done=0.5, loss=float("nan"), images_per_second=float("inf"))
    (line,) = events(stream.getvalue())
    assert (line["done"], line["loss"], line["images_per_second"]) == (0.5, None, None)


def test_steps_are_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("vitcompress.runtime.console.time.monotonic", lambda: now)
    stream = io.StringIO()
    reporter = Reporter(quiet=True, log=JsonLog(stream))
    with reporter.training() as ticker, reporter.counting("measuring options") as count:
        for step in range(1, 101):
            now += 0.125  # exact in binary
            ticker.step(done=step / 100, loss=1.0, images_per_second=1.0)
            count(step / 100)
    told = [line["done"] for line in events(stream.getvalue()) if line["event"] == "step"]
    assert told == [0.01, 0.41, 0.81, 1.0]
    assert [line["done"] for line in events(stream.getvalue()) if line["event"] == "progress"] == told


@pytest.mark.parametrize(
    ("seconds_per_step", "warned"), [(31.0, ["about 8.6 hours", "--max-minutes"]), (3.0, [])], ids=["long", "short"]
)
def test_a_training_of_more_than_an_hour_is_announced_after_its_first_steps(
    seconds_per_step: float, warned: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("vitcompress.runtime.console.time.monotonic", lambda: now)
    for forecast in (True, False):
        with Reporter().training(forecast=forecast) as ticker:
            now += 100.0  # the first step also starts the workers, so it does not count
            for step in range(1, 21):
                ticker.step(done=step / 1000, loss=1.0, images_per_second=1.0)
                now += seconds_per_step
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("The training will take")]
        assert len(lines) == (1 if forecast and warned else 0)
        assert all(text in line for line in lines for text in warned)


def test_of_several_processes_one_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    Reporter(log=JsonLog(stream)).say("hello")
    assert stream.getvalue() == ""


def test_the_page_has_every_event_and_field() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == list(EVENTS)
    for name, text in rows:
        assert set(EVENTS[name]) <= set(re.findall(r"`(\w+)`", text)), name


def test_no_colour_where_it_is_not_wanted(
    vitcompress: Vitcompress, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variables in ({}, {"NO_COLOR": "1", "TTY_COMPATIBLE": "1"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert "\x1b[3" not in vitcompress("report", mini).out
        assert "\x1b[3" not in vitcompress("report", "nowhere").err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_that_is_full(mini: Path, vitcompress: Vitcompress) -> None:
    ended = vitcompress("check", mini, "--min-ratio", 1, "--log-json", "/dev/full")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("Error: --log-json /dev/full: No space left on device.")


def run_into(stdout: int | IO[bytes], *words: object) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "vitcompress", *map(str, words)], stdout=stdout, stderr=subprocess.PIPE, text=True
    )
    return ended.returncode, ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", [["report"], ["report", "--json"]], ids=" ".join)
def test_a_stdout_that_takes_no_more(words: list[str], made: Path) -> None:
    words = [*words, str(made / "mini.safetensors")]
    with open("/dev/full", "wb") as full:
        assert run_into(full, *words) == (
            2, "Error: The result cannot be written to stdout: No space left on device.\n",
        )  # fmt: skip
    ours, theirs = os.pipe()
    os.close(ours)  # who would have read has gone
    try:
        assert run_into(theirs, *words) == (141, "")
    finally:
        os.close(theirs)


def test_a_loss_of_nothing_has_no_sign(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter().training() as ticker:
        ticker.step(done=1.0, loss=-1e-6, images_per_second=1.0)
    assert "loss 0.000" in capsys.readouterr().err


def test_names_from_files_cannot_speak_to_the_terminal(
    vitcompress: Vitcompress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = vitcompress("report", tmp_path / "a\x1b]0;x\x07\u202eb.safetensors")
    assert ended.code == 2
    assert "a?]0;x??b" in ended.err.replace("\n", "")
    Reporter().say("\x1b[2J" + "y" * 10**6)
    said = capsys.readouterr().err
    assert said.startswith("?[2Jyyy")
    assert len(said) < 50_000
