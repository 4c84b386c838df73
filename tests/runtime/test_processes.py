"""Several processes do what one does: same steps, every image once, an error and no hang."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import Vitcompress
from tests.forked import Command
from vitcompress.data.loaders import ProcessShare, ShuffledBatches
from vitcompress.errors import RecipeError
from vitcompress.pipeline.checks import check_run
from vitcompress.recipe import DataRecipe, ModelRecipe, Recipe, RunRecipe
from vitcompress.runtime import launch, processes

TOLERANCE = 1e-5  # of weights that are some tenths


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders: 20 images to train on, 11 to evaluate on, so the last batch of 4 has 3."""
    root = tmp_path_factory.mktemp("labelled")
    draw = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 11)):
        for number in range(count):
            path = root / split / "abcde"[number % 5] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def words(teacher: Sequence[str], labelled: Path) -> list[object]:
    flags: list[object] = ["--data", labelled, "--share", 2, "--batch-size", 4, "--steps", 5, "--lr", 1e-3]
    return ["compress", *teacher, *flags, "--device", "cpu", "--precision", "fp32", "--num-workers", 0]


def apart(a: Path, b: Path) -> float:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def report(path: Path) -> Any:
    return json.loads(path.with_suffix(".report.json").read_text())


@pytest.mark.thorough
@pytest.mark.parametrize(
    "more",
    [
        ["--mixup", 0.8, "--loss", "labels=1", "--loss", "logits=1"],
        pytest.param(  # of block 0 the loss would be 0, and its gradient rounding
            ["--loss", "hidden=1", "--layers", "1:1", "--ema", 0.5], marks=pytest.mark.slow
        ),
        pytest.param(["--small-first", 0.5], marks=pytest.mark.slow),
    ],
    ids=["mixup-and-labels", "unreached-parameters-and-mean", "small-views-first"],
)
def test_two_processes_take_the_steps_of_one(
    more: list[object], words: list[object], tmp_path: Path, vitcompress: Vitcompress
) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert vitcompress(*words, *more, "--out", one).code == 0
    ended = Command(*words, *more, "--num-processes", 2, "--out", two).ended()
    assert ended.returncode == 0, ended.stderr
    assert apart(one, two) < TOLERANCE
    first, second = report(one), report(two)
    for a, b in zip(first["train"]["loss_curve"], second["train"]["loss_curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    assert second["train"]["images"] == first["train"]["images"] == 20
    assert second["accuracy"]["num_images"] == 11
    for name in ("student_top1", "teacher_top1", "teacher_top5", "agreement", "kl"):
        assert second["accuracy"][name] == pytest.approx(first["accuracy"][name], abs=1e-4)
    assert [b["top1"] for b in second["baselines"]] == [b["top1"] for b in first["baselines"]]
    # what is printed is printed once, and nothing but our own words
    assert ended.stderr.count("parameters") == ended.stderr.count("wrote ") == ended.stdout.count("student ┃") == 1
    assert "rank" not in ended.stderr.lower()
    assert "warning" not in ended.stderr.lower()


@pytest.mark.thorough
def test_parts_of_a_batch_add_up_to_the_batch(words: list[object], tmp_path: Path, vitcompress: Vitcompress) -> None:
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    more = ["--mixup", 0.8, "--loss", "labels=1", "--loss", "hidden=1", "--loss", "attention=1"]
    assert vitcompress(*words, *more, "--out", whole).code == 0
    assert vitcompress(*words, *more, "--accumulate", 2, "--out", parts).code == 0
    assert apart(whole, parts) < TOLERANCE
    first, second = (report(path)["train"]["loss_curve"] for path in (whole, parts))
    assert all(a == pytest.approx(b, rel=1e-4, abs=1e-6) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits(words: list[object], tmp_path: Path) -> None:
    asked = [*words, "--num-processes", 2, "--save-every", 2, "--drop-path", 0.3]
    asked[asked.index("--steps") + 1] = 20
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert Command(*asked, "--out", whole).ended().returncode == 0
    command = Command(*asked, "--out", cut)
    command.wait_for(tmp_path / "cut.checkpoints" / "step-00000004")
    command.send(signal.SIGTERM)
    ended = command.ended(60)
    assert (ended.returncode, "Its state is in" in ended.stderr) == (143, True), ended.stderr
    assert "Traceback" not in ended.stderr
    ended = Command(*asked, "--out", cut, "--resume").ended()
    assert ended.returncode == 0, ended.stderr
    assert apart(whole, cut) == 0.0


def children(pid: int) -> list[int]:
    found = []
    for task in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = task.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(task.parent.name))
    return sorted(found)


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_a_process_that_dies_ends_the_run_with_an_error(words: list[object], tmp_path: Path) -> None:
    words[words.index("--steps") + 1] = 2000
    command = Command(*words, "--num-processes", 2, "--save-every", 2, "--out", tmp_path / "a.safetensors")
    command.wait_for(tmp_path / "a.checkpoints" / "step-00000002")
    os.kill(children(command.pid)[-1], signal.SIGKILL)
    start = time.monotonic()
    ended = command.ended(100)
    assert time.monotonic() - start < 60
    assert ended.returncode == 2
    assert "was killed by SIGKILL, and the others with it" in ended.stderr
    assert not (tmp_path / "a.safetensors").exists()


def test_a_fault_is_told_once_and_before_any_process_starts(words: list[object], tmp_path: Path) -> None:
    ended = Command(*words, "--num-processes", 3, "--out", tmp_path / "a.safetensors").ended()
    assert ended.returncode == 2
    assert ended.stderr.count("--batch-size 4 cannot be divided into 3 processes.") == 1
    assert "Try 3." in ended.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("skip", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_unreadable_image_of_one_process_ends_all_of_them_or_is_skipped(
    skip: bool, words: list[object], labelled: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "labelled" / "train" / "a" / "bad.png"
    subprocess.run(["cp", "-r", labelled, tmp_path / "labelled"], check=True)
    bad.write_bytes(b"no image")
    asked = [tmp_path / "labelled" if word == labelled else word for word in words]
    asked[asked.index("--steps") + 1] = 20
    asked += ["--num-processes", 2, "--out", tmp_path / "a.safetensors"]
    ended = Command(*asked, *["--skip-bad-images"] * skip).ended()
    if not skip:
        assert (ended.returncode, ended.stderr.count(f"Unreadable image: {bad}")) == (2, 1), ended.stderr
        return
    assert ended.returncode == 0, ended.stderr
    log = report(tmp_path / "a.safetensors")["train"]
    assert log["images"] == 80
    assert log["skipped_images"] >= 3


@pytest.mark.thorough
def test_accelerate_can_launch_it(words: list[object], tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # accelerate's own, for CPUs
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "vitcompress", *map(str, words), "--out", str(tmp_path / "a.safetensors")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("wrote ") == 1


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_what_would_untie_parameters_is_refused(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(RecipeError, match="shards parameters"):
        processes.join(RunRecipe(device="cpu"))


# --- who starts how many


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.parametrize(
    ("recipe", "number", "starts"),
    [
        (RunRecipe(), 4, True),
        (RunRecipe(device="cpu"), 1, False),
        (RunRecipe(num_processes=1), 1, False),
        (RunRecipe(device="cpu", num_processes=2), 2, True),
    ],
)
def test_one_process_per_gpu_unless_asked_otherwise(recipe: RunRecipe, number: int, starts: bool, gpus: None) -> None:
    assert (launch.num_processes(recipe), launch.must_start(recipe)) == (number, starts)


def test_what_was_launched_starts_nothing(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert (launch.num_processes(RunRecipe()), launch.must_start(RunRecipe())) == (16, False)


def test_a_batch_need_be_cut_only_for_processes_that_there_are(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(ModelRecipe("x"), data=DataRecipe(batch_size=6))
    check_run(recipe)
    with pytest.raises(RecipeError, match="cannot be divided into 4 processes"):
        check_run(recipe, starts=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_run(recipe, trains=False)
    with pytest.raises(RecipeError, match="cannot be divided into 4 processes"):
        check_run(recipe)


def test_a_process_may_join_again_with_another_precision() -> None:
    precisions: tuple[Any, ...] = ("fp32", "bf16", "fp32")
    for precision in precisions:
        found = processes.join(RunRecipe(device="cpu", precision=precision))
        assert (found.mixed_precision, found.device.type) == ("bf16" if precision == "bf16" else "no", "cpu")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_cuda_it_runs_on_the_cpu(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert processes.join(RunRecipe(device=device)).device.type == "cpu"


def test_a_data_worker_outlives_signals_for_a_while_only() -> None:
    code = (
        "import sys, time; from vitcompress.runtime import processes; processes._WORKER_SECONDS = 1.0;"
        "processes.outlive_signals(0); print('ready', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        for number in (signal.SIGINT, signal.SIGTERM):
            worker.send_signal(number)
        time.sleep(0.2)
        assert worker.poll() is None
        assert worker.wait(timeout=60) == 0


# --- how images are dealt out


@pytest.mark.parametrize(("count", "accumulate", "batch"), [(1, 1, 5), (2, 1, 8), (3, 2, 12), (2, 3, 6)])
def test_every_image_of_a_step_goes_to_one_part(count: int, accumulate: int, batch: int) -> None:
    whole = list(ShuffledBatches(20, batch, seed=3, num_steps=4))
    shares = [
        list(ShuffledBatches(20, batch, seed=3, num_steps=4, share=ProcessShare(process, count, accumulate)))
        for process in range(count)
    ]
    for step in range(4):
        parts = [part for share in shares for part in share[step * accumulate : (step + 1) * accumulate]]
        assert sorted(key for part in parts for key in part) == sorted(whole[step])
        assert {len(part) for part in parts} == {batch // (count * accumulate)}
        if batch // (count * accumulate) % 2 == 0:  # pairs that are mixed stay together
            pairs = {frozenset((part[i], part[-1 - i])) for part in parts for i in range(len(part) // 2)}
            assert pairs == {frozenset((whole[step][i], whole[step][-1 - i])) for i in range(batch // 2)}


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("start", [1, 5, 11])
def test_a_stream_that_starts_later_goes_on_the_same(start: int, repeats: int) -> None:
    whole = list(ShuffledBatches(7, 4, seed=1, num_steps=15, repeats=repeats))
    assert list(ShuffledBatches(7, 4, seed=1, num_steps=15, repeats=repeats, start=start)) == whole[start:]


# --- trackers


def test_a_tracker_that_is_not_there_is_named(
    words: list[object], tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    ended = vitcompress(*words, "--log-with", "wandb", "--out", tmp_path / "a.safetensors")
    assert (ended.code, "vitcompress[wandb]" in ended.err) == (2, True)


def test_tensorboard_gets_every_step(words: list[object], tmp_path: Path, vitcompress: Vitcompress) -> None:
    pytest.importorskip("tensorboard", reason="the tracker is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert vitcompress(*words, "--log-with", "tensorboard", "--out", tmp_path / "a.safetensors").code == 0
    (events,) = (tmp_path / "a.logs").glob("events.out.tfevents.*")  # what was asked for is in a folder below
    found = EventAccumulator(str(events)).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5]
    curve = report(tmp_path / "a.safetensors")["train"]["loss_curve"]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([p["loss"] for p in curve], abs=1e-6)
