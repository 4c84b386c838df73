"""A process waits for the others with a limit, and says what it waits for."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest

from tests.forked import Command
from vitcompress.errors import RecipeError
from vitcompress.recipe import RunRecipe
from vitcompress.runtime import joining, launch, processes
from vitcompress.runtime.console import Notice, is_main, local_processes, notices

WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in joining.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK=1 in the environment, but not WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 in the environment, but not WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT"),
        ({**WHOLE, "RANK": "2"}, "RANK=2 in the environment, but of 2 processes the last is 1"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1 in the environment, but of 1 processes the last is 0"),
        ({**WHOLE, "WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is not a whole number"),
        ({**WHOLE, "MASTER_PORT": "-1"}, "MASTER_PORT=-1 in the environment is not a whole number"),
    ],
)
def test_incomplete_variables_of_a_launcher_are_named(
    variables: dict[str, str], message: str, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(RecipeError, match=message) as caught:
        processes.join(RunRecipe(device="cpu"))
    assert "unset" in caught.value.hint
    assert all(name in caught.value.hint for name in variables)


def test_processes_with_gpus_need_a_local_rank(environment: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        environment.setenv(name, value)
    environment.delenv("LOCAL_RANK")
    joining.check_launch(on_gpu=False)
    with pytest.raises(RecipeError, match="but not LOCAL_RANK"):
        joining.check_launch(on_gpu=True)


@pytest.mark.parametrize(
    "variables",
    [{}, {"WORLD_SIZE": "1"}, {**WHOLE, "WORLD_SIZE": "1", "MASTER_ADDR": "10.1.2.3"}, dict.fromkeys(WHOLE, "")],
)
def test_what_a_launch_of_one_process_left_over_is_harmless(
    variables: dict[str, str], environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert processes.join(RunRecipe(device="cpu")).num_processes == 1
    assert processes.alone().num_processes == 1
    assert (is_main(), local_processes(), launch.num_launched()) == (True, 1, 1)


def test_who_waits_says_so_and_gives_up(environment: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        environment.setenv(name, value)
    environment.setattr(joining, "NOTICE_SECONDS", 0.1)
    environment.setattr(joining, "JOIN_SECONDS", 0.3)
    environment.setattr("torch.distributed.init_process_group", lambda *args, **how: threading.Event().wait())
    said: list[str] = []
    with notices(said.append), pytest.raises(RecipeError, match="did not join within 0 seconds") as caught:
        processes.join(RunRecipe(device="cpu"))
    (line,) = said
    for text in (line, str(caught.value)):
        assert all(f"{name}={value}" in text for name, value in WHOLE.items())
    for text in (line, caught.value.hint):
        assert "unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT" in text


def test_a_group_that_cannot_be_joined_is_a_mistake(environment: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **how: object) -> None:
        raise RuntimeError("address already in use\nmore")

    for name, value in WHOLE.items():
        environment.setenv(name, value)
    environment.setattr("torch.distributed.init_process_group", fail)
    with pytest.raises(RecipeError, match="the other process cannot be joined: address already in use"):
        processes.join(RunRecipe(device="cpu"))


def test_notices_are_told_once_and_by_the_main_process() -> None:
    said: list[str] = []
    for is_main_process in (True, False):
        with notices(said.append, is_main=is_main_process):
            for _ in range(2):
                warnings.warn(Notice("few workers"), stacklevel=1)
                warnings.warn(Notice("waiting", everywhere=True), stacklevel=1)
    assert said == ["few workers", "waiting", "waiting"]


def test_a_signal_ends_the_wait_in_torch() -> None:
    code = """
        import os, signal, threading
        from torch.distributed import TCPStore
        from vitcompress.runtime import joining, signals

        signals.watch()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            joining.join_group(lambda: TCPStore("127.0.0.1", 0, 2, is_master=True))
        except signals.TerminationError:
            print("terminated")
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "terminated"), ended.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_that_waits_for_an_old_launch(
    number: signal.Signals, environment: pytest.MonkeyPatch
) -> None:
    for name, value in {**WHOLE, "MASTER_PORT": "0"}.items():
        environment.setenv(name, value)
    command = Command("plan", "deit_tiny", "--calibrate", "built-in", "--device", "cpu")
    time.sleep(3)  # it waits, or still imports torch: both end
    command.send(number)
    ended = command.ended(30)
    assert (ended.returncode, "Traceback" in ended.stderr) == (128 + number, False), ended.stderr
