"""An interrupted and resumed run writes the same file as an uninterrupted one, bit by bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import Vitcompress
from tests.forked import Command
from vitcompress.distill import checkpoints
from vitcompress.distill import state as run
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.errors import TrainingError
from vitcompress.recipe import Interval, save_interval
from vitcompress.runtime import signals as interrupts

STEPS = 7
RECIPES: dict[str, list[object]] = {
    "plain": ["--share", 2],
    "drop-path-and-mean": ["--share", 2, "--drop-path", 0.3, "--ema", 0.9],
    "muon-and-fade": ["--share", 4, "--optimizer", "muon", "--fade", 0.6, "--accumulate", 2],
    "workers-and-mixup": ["--share", 2, "--num-workers", 2, "--mixup", 0.8],
    "small-views-first": ["--share", 2, "--small-first", 0.6, "--accumulate", 2, "--mixup", 0.8],
    "searched-and-int8": ["--target-ratio", 1.5, "--kinds", "narrow", "--store", "int8", "--qat-fraction", 0.5],
}


class Killed(BaseException):
    """Nothing catches it; only context managers clean up."""


@pytest.fixture
def words(teacher: Sequence[str], flat: Path) -> list[object]:
    common: list[object] = ["--data", flat, "--batch-size", 4, "--steps", STEPS, "--device", "cpu", "--no-baselines"]
    return ["compress", *teacher, *common, "--save-every", 2]


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], None]:
    """Make the training die before its update of a step; return a function that undoes this."""
    whole = run.TrainState.record

    def record(self: run.TrainState, *args: Any, **kwargs: Any) -> None:
        if self.steps == step:
            raise Killed
        whole(self, *args, **kwargs)

    monkeypatch.setattr(run.TrainState, "record", record)
    return lambda: monkeypatch.setattr(run.TrainState, "record", whole)


def cut_short(
    monkeypatch: pytest.MonkeyPatch, vitcompress: Vitcompress, asked: Sequence[object], out: Path, step: int
) -> None:
    """Run a command that dies before its update of a step."""
    live = kill_at(monkeypatch, step)
    with pytest.raises(Killed):
        vitcompress(*asked, "--out", out)
    live()


def same_tensors(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)


def curve(path: Path) -> Any:
    return json.loads(path.with_suffix(".report.json").read_text())["train"]["loss_curve"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    name: str, words: list[object], tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [] if "--num-workers" in RECIPES[name] else ["--num-workers", 0]
    asked = [*words, *RECIPES[name], *workers]
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert vitcompress(*asked, "--out", whole).code == 0
    steps = range(STEPS) if name == "plain" else range(2, STEPS)  # before the first state it starts over
    for step in random.Random(name).sample(steps, 3 if name == "plain" else 1):
        cut_short(monkeypatch, vitcompress, asked, cut, step)
        assert not cut.exists()
        ended = vitcompress(*asked, "--out", cut, "--resume")
        assert ended.code == 0, ended.err
        begins = step < 2 and "--target-ratio" not in asked  # a searched plan is kept at once
        assert ("starting from the beginning" if begins else "continuing from") in ended.err
        assert same_tensors(whole, cut), step
        assert curve(whole) == curve(cut)
        assert not list(tmp_path.glob("*.checkpoints"))
        cut.unlink()


def test_only_the_last_two_states_are_kept(
    words: list[object], tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(monkeypatch, vitcompress, [*words, "--num-workers", 0], tmp_path / "cut.safetensors", STEPS - 1)
    folder = tmp_path / "cut.checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "step-00000004", "step-00000006"]


def test_a_run_killed_while_it_saves_goes_on_from_the_state_before(
    words: list[object], tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*words, "--num-workers", 0]
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert vitcompress(*asked, "--out", whole).code == 0
    write = save_file

    def write_half(tensors: Any, path: Path) -> None:
        if "00000004" in str(path):
            path.write_bytes(b"half of it")
            raise Killed
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", write_half)
        with pytest.raises(Killed):
            vitcompress(*asked, "--out", cut)
    ended = vitcompress(*asked, "--out", cut, "--resume")
    assert (ended.code, "step-00000002" in ended.err) == (0, True)
    assert same_tensors(whole, cut)


@pytest.mark.thorough
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_is_a_clear_error_and_the_last_good_state_survives(
    fault: Exception,
    words: list[object],
    tmp_path: Path,
    vitcompress: Vitcompress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [*words, "--num-workers", 0]
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    write = save_file

    def fail(tensors: Any, path: Path) -> None:
        if "00000004" in str(path):
            raise fault
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", fail)
        ended = vitcompress(*asked, "--out", cut)
    assert (ended.code, "cannot be written" in ended.err, "--resume" in ended.err) == (2, True, True)
    assert sorted(path.name for path in (tmp_path / "cut.checkpoints").iterdir()) == ["run.json", "step-00000002"]
    assert vitcompress(*asked, "--out", cut, "--resume").code == vitcompress(*asked, "--out", whole).code == 0
    assert same_tensors(whole, cut)


@pytest.mark.thorough
def test_another_recipe_or_teacher_or_other_images_are_refused_with_the_differences(
    words: list[object], images: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut.safetensors"
    cut_short(monkeypatch, vitcompress, [*words, "--num-workers", 0], cut, 5)
    changed = ["--lr", 0.01, "--seed", 3, "--data", images, "--model-arg", "qk_norm=True"]
    ended = vitcompress(*words, *changed[:-2], "--out", cut, "--resume")
    assert ended.code == 2
    for line in ("--lr: 0.01, was not given", "--seed: 3, was 0", "training images: 15 images", "--data: "):
        assert line in ended.err
    assert "--steps" not in ended.err
    # devices, workers and gates may change
    assert vitcompress(*words, "--num-workers", 1, "--min-ratio", 1, "--out", cut, "--resume").code == 0


@pytest.mark.thorough
def test_without_a_state_it_starts_from_the_beginning_and_says_so(
    words: list[object], tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut.safetensors"
    ended = vitcompress(*words, "--num-workers", 0, "--out", cut, "--resume")
    assert (ended.code, "starting from the beginning" in ended.err) == (0, True)
    cut_short(monkeypatch, vitcompress, [*words, "--num-workers", 0], cut, 5)
    ended = vitcompress(*words, "--num-workers", 0, "--out", cut)
    assert (ended.code, "--resume would continue" in ended.err) == (0, True)


@pytest.mark.parametrize("text", ["{}", "[]", "1", "{", "[" * 100_000, '{"facts": null, "settled": 1}'])
def test_facts_of_a_run_that_are_none_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TrainingError, match=r"run\.json cannot be read"):
        Checkpoints(tmp_path, Interval(steps=1)).read_run()


def test_a_state_that_cannot_be_read_is_named(
    words: list[object], tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut.safetensors"
    cut_short(monkeypatch, vitcompress, [*words, "--num-workers", 0], cut, 5)
    newest = tmp_path / "cut.checkpoints" / "step-00000004"
    (newest / "optimizer.bin").write_bytes(b"no longer what it was")
    ended = vitcompress(*words, "--num-workers", 0, "--out", cut, "--resume")
    assert (ended.code, f"{newest} cannot be read" in ended.err) == (2, True)


def test_a_finetuning_goes_on_too(
    mini: Path, images: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["finetune", mini, "--data", images, "--batch-size", 4, "--steps", STEPS, "--num-workers", 0]
    asked += ["--device", "cpu", "--save-every", 2, "--loss", "labels=1"]
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert vitcompress(*asked, "--out", whole).code == 0
    cut_short(monkeypatch, vitcompress, asked, cut, 5)
    ended = vitcompress(*asked, "--out", cut, "--resume")
    assert (ended.code, "step-00000004" in ended.err) == (0, True)
    assert same_tensors(whole, cut)


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_real_process_goes_on_after_a_real_signal(
    number: signal.Signals, words: list[object], tmp_path: Path, vitcompress: Vitcompress
) -> None:
    asked = [*words[: words.index("--steps")], "--steps", 60, *words[words.index("--steps") + 2 :]]
    asked += ["--num-workers", 0, "--save-every", 3]
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    command = Command(*asked, "--out", cut)
    command.wait_for(tmp_path / "cut.checkpoints" / "step-00000003")
    command.send(number)
    start = time.monotonic()
    ended = command.ended(60)
    if number == signal.SIGTERM:
        assert time.monotonic() - start < 20  # a few seconds on an idle machine
        assert ended.returncode == 128 + number
        assert "Terminated. Its state is in" in ended.stderr
        assert "Traceback" not in ended.stderr
    assert vitcompress(*asked, "--out", cut, "--resume").code == 0
    assert vitcompress(*asked, "--out", whole).code == 0
    assert same_tensors(whole, cut)


@pytest.mark.thorough
def test_sigterm_to_workers_too_keeps_the_state(words: list[object], tmp_path: Path) -> None:
    asked = [*words[: words.index("--steps")], "--max-minutes", 5, "--save-every", 2, "--num-workers", 1]
    command = Command(*asked, "--out", tmp_path / "cut.safetensors")
    command.wait_for(tmp_path / "cut.checkpoints" / "step-00000002")
    command.send(signal.SIGTERM, group=True)
    ended = command.ended(60)
    assert (ended.returncode, "Terminated. Its state is in" in ended.stderr) == (143, True), ended.stderr


@pytest.mark.broad
@pytest.mark.parametrize(("seconds", "kept"), [(0.0, True), (1e9, False)])
def test_what_follows_a_long_training_may_be_terminated(
    seconds: float,
    kept: bool,
    words: list[object],
    tmp_path: Path,
    vitcompress: Vitcompress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [*words[: words.index("--save-every")], "--num-workers", 0, "--out", tmp_path / "cut.safetensors"]
    monkeypatch.setattr(checkpoints, "MIN_SECONDS_TO_KEEP", seconds)
    with monkeypatch.context() as patch:
        patch.setattr("vitcompress.pipeline.finish.measure", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
        ended = vitcompress(*asked)
    assert (ended.code, "Its state is in" in ended.err) == (143, kept)
    assert [path.name for path in tmp_path.glob("*.checkpoints/step-*")] == [f"step-{STEPS:08}"] * kept
    assert vitcompress(*asked, "--resume").code == 0


def test_a_signal_at_the_very_end_of_a_training_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> None:
        with interrupts.deferring(ctrl_c=True) as asked:
            interrupts._receive(signal.SIGINT, None)
            assert asked()
            with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C does not wait
                interrupts._receive(signal.SIGINT, None)

    monkeypatch.setattr(interrupts, "_received", [])
    monkeypatch.setattr(interrupts, "_raised", False)
    with pytest.raises(KeyboardInterrupt):
        train()


@pytest.mark.broad
@pytest.mark.parametrize("file", ["notes.txt", "run.json", "step-7", "step-00000002"])
def test_files_of_others_are_never_removed(
    file: str, words: list[object], tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*words, "--num-workers", 0, "--out", tmp_path / "cut.safetensors"]
    theirs = tmp_path / "cut.checkpoints" / file
    theirs.parent.mkdir()
    theirs.write_text("{}")
    if file != "step-00000002":  # may be left by an interrupted run
        ended = vitcompress(*asked)
        assert (ended.code, "cut.checkpoints" in ended.err) == (2, True)
        assert [path.name for path in tmp_path.iterdir()] == ["cut.checkpoints"]
        theirs.unlink()
    cut_short(monkeypatch, vitcompress, asked[:-2], tmp_path / "cut.safetensors", 5)
    (theirs.parent / "notes.txt").write_text("ours")
    assert vitcompress(*asked, "--resume").code == 0
    assert [path.name for path in theirs.parent.iterdir()] == ["notes.txt"]


def test_a_file_where_the_folder_would_be_is_refused(
    words: list[object], tmp_path: Path, vitcompress: Vitcompress
) -> None:
    (tmp_path / "cut.checkpoints").write_text("notes")
    ended = vitcompress(*words, "--out", tmp_path / "cut.safetensors")
    assert (ended.code, "--save-every none" in ended.err) == (2, True)


def test_sigterm_where_nothing_trains_ends_at_once(words: list[object], tmp_path: Path) -> None:
    command = Command(*words[: words.index("--steps")], "--target-ratio", 2, "--out", tmp_path / "a.safetensors")
    command.wait_for("\n")  # the search has started
    command.send(signal.SIGTERM)
    ended = command.ended(60)
    assert (ended.returncode, "Traceback" in ended.stderr) == (143, False), ended.stderr
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "interval"),
    [("500", Interval(steps=500)), ("10m", Interval(seconds=600)), ("0.5m", Interval(seconds=30)), ("none", None)],
)
def test_how_often(text: str, interval: Interval | None) -> None:
    assert save_interval(text) == interval


@pytest.mark.parametrize("text", ["0", "1.5", "10s", "-3", "m", "0m"])
def test_no_interval(text: str) -> None:
    with pytest.raises(ValueError, match="--save-every"):
        save_interval(text)
