"""Data workers fit the shared memory; where one dies or cannot send, the run ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import draw_image
from tests.data.opened import RGB, folder_set
from vitcompress.data import workers
from vitcompress.data.loaders import evaluation_loader, training_loader
from vitcompress.data.workers import Loader, fitting_workers, shared_room
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe
from vitcompress.runtime import signals
from vitcompress.runtime.console import Notice

VIEW = 3 * 224 * 224 * 4  # bytes


@pytest.fixture(autouse=True)
def no_handler_of_torch() -> Iterator[None]:
    yield
    assert signal.getsignal(signal.SIGCHLD) in (signal.SIG_DFL, signal.SIG_IGN)


# --- how many


@pytest.mark.parametrize(
    ("room", "processes", "held", "asked", "number"),
    [
        (64 << 20, 1, 2, 1, 0),  # Docker's default, less than a batch of 77 MB
        (400_000_000, 1, 2, 8, 1),  # 0.9 of it holds 4 batches: 2 in use, 2 of a worker
        (1_000_000_000, 1, 2, 8, 4),
        (1_000_000_000, 1, 8, 8, 1),  # of 4 parts per step
        (1_000_000_000, 2, 2, 8, 1),
        (1 << 40, 1, 2, 8, 8),
        (None, 1, 2, 8, 8),
        (0, 1, 2, 0, 0),
    ],
)
def test_no_more_workers_than_the_shared_memory_holds(
    room: int | None, processes: int, held: int, asked: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "shared_room", lambda: room)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert fitting_workers(asked, 128, VIEW, held) == number
    assert len(told) == (number < asked)
    for line in told:
        assert line.category is Notice
        assert f"for batches of 128 images, {asked} data worker" in str(line.message)
        assert f"using {number}." in str(line.message)


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_loaders_ask_for_room(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        draw_image(tmp_path / f"{number}.png", number)
    images, recipe = folder_set(tmp_path), DataRecipe(batch_size=4, num_workers=2)

    def loader() -> Any:
        if kind == "training":
            return training_loader(images, RGB, recipe, seed=0, num_steps=2)
        return evaluation_loader(images, RGB, DataRecipe(batch_size=1, num_workers=2))

    assert loader().num_workers == 2
    monkeypatch.setattr(workers, "shared_room", lambda: 0)
    with pytest.warns(Notice, match="has 0 MB free"):
        found = loader()
    assert found.num_workers == 0
    assert len(list(found)) == {"training": 2, "evaluation": 4}[kind]


def test_the_room_is_that_of_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(workers, "_SHARED", str(tmp_path))
    room = shared_room()
    assert room is not None
    assert room == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.5)
    monkeypatch.setattr(workers, "_SHARED", str(tmp_path / "missing"))
    assert shared_room() == 0
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert shared_room() is None


# --- what ends the run


class Unsendable:
    """Cannot be sent, like a tensor that the shared memory has no room for."""

    def __reduce__(self) -> str:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.make()


def die_of_memory() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_early() -> None:
    os._exit(3)


def fail() -> None:
    raise ZeroDivisionError


def lose_disk() -> None:
    raise OSError(5, "the disk is gone")


def blocked_signals() -> list[int]:
    return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def loaded(make: Any, **options: Any) -> list[Any]:
    return list(Loader(Items(make), batch_size=None, num_workers=1, **options))


def test_a_batch_that_cannot_be_sent_ends_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"cannot pass on a batch: .* No space left on device \(28\)\.$") as caught:
        loaded(Unsendable)
    assert "--num-workers" in caught.value.hint
    assert "/dev/shm" in caught.value.hint
    assert capfd.readouterr().err == ""


@pytest.mark.thorough  # torch looks for dead workers every 5 seconds
@pytest.mark.parametrize(
    ("die", "message"),
    [
        (die_of_memory, "was killed by SIGKILL: is the machine out of memory?"),
        (end_early, "has ended with exit code 3."),
    ],
)
def test_a_worker_that_dies_ends_the_run(die: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        loaded(die)
    assert str(caught.value) == f"A data worker {message}"
    assert "--num-workers" in caught.value.hint


def test_a_worker_that_a_signal_of_the_run_has_ended_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = SimpleNamespace(is_alive=lambda: False, exitcode=-signal.SIGTERM)
    with pytest.raises(DataError, match=r"^A data worker was killed by SIGTERM\.$"), workers._as_errors([dead]):
        raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")
    for number, kind in ((signal.SIGTERM, signals.TerminationError), (signal.SIGINT, KeyboardInterrupt)):
        monkeypatch.setattr(signals, "_received", [number])
        with pytest.raises(kind), workers._as_errors([dead]):
            raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")


def test_workers_that_cannot_start_are_an_error() -> None:
    with (
        pytest.raises(DataError, match=r"cannot be used: .*Cannot allocate memory\.$") as caught,
        workers._as_errors(()),
    ):
        raise OSError(12, "Cannot allocate memory")
    assert "--num-workers" in caught.value.hint


def test_what_a_worker_cannot_read_is_told() -> None:
    with pytest.raises(DataError, match=r"^The data workers cannot be used: \[Errno 5\] the disk is gone\.$"):
        loaded(lose_disk)


def test_a_lost_connection_means_a_dead_worker() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        ended = SimpleNamespace(
            sentinel=os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else pytest.skip("there are no pidfds"),
            is_alive=lambda: process.poll() is None,
            exitcode=-signal.SIGKILL,
        )
        with pytest.raises(DataError, match="was killed by SIGKILL"), workers._as_errors([ended]):
            raise ConnectionResetError(104, "Connection reset by peer")
        os.close(ended.sentinel)


def test_a_mistake_in_a_worker_stays_one() -> None:
    with pytest.raises(ZeroDivisionError):
        loaded(fail)


# --- signals


def test_workers_receive_signals_only_with_their_own_handlers() -> None:
    assert loaded(blocked_signals) == [[]] * 4
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_a_signal_in_the_first_moment_of_a_worker_does_not_end_it() -> None:
    code = """
        import multiprocessing.process, os, signal
        from vitcompress.data.workers import Loader
        from vitcompress.runtime import signals

        begin = multiprocessing.process.BaseProcess._bootstrap

        def interrupted(self, *args, **how):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            return begin(self, *args, **how)

        multiprocessing.set_start_method("fork")
        multiprocessing.process.BaseProcess._bootstrap = interrupted
        signals.watch()
        print(list(Loader([1, 2, 3], batch_size=None, num_workers=1)))
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout.strip(), ended.stderr) == ("[1, 2, 3]", "")


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small /dev/shm: needs root")
def test_a_small_shared_memory_stops_no_run(teacher: list[str], tmp_path: Path) -> None:
    for number in range(4):
        draw_image(tmp_path / "images" / f"{number}.png", number)
    words = ["compress", *teacher, "--data", tmp_path / "images", "--share", "2", "--steps", "2", "--batch-size", "4"]
    command = [sys.executable, "-m", "vitcompress", *words, "--num-workers", "2", "--no-baselines"]
    mount = 'mount -t tmpfs -o size=128k tmpfs /dev/shm || exit 99; exec "$@"'
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", *map(str, command), "--out", str(tmp_path / "a.safetensors")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if ended.returncode == 99 or "unshare" in ended.stderr:
        pytest.skip("nothing can be mounted")
    assert ended.returncode == 0, ended.stderr
    assert "/dev/shm has 1 MB free; for batches of 4 images, 2 data workers need" in ended.stderr
    assert "using 0." in ended.stderr
