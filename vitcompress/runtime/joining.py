"""Join the processes that a launcher started; give up where they do not come.

Variables of an old launch may be left over in the environment.

torch waits for the other processes outside Python, where no signal handler runs. So a thread waits
there, while the main thread counts the seconds.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable

from vitcompress.errors import RecipeError, first_line, raise_faults
from vitcompress.runtime.console import Notice, launched

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOTICE_SECONDS = 10.0  # after which the command says what it waits for
JOIN_SECONDS = 300.0  # after which it gives up; launched processes are seconds apart
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # by several processes
_POLL_SECONDS = 0.1


def check_launch(*, on_gpu: bool) -> None:
    """Make sure that the variables of a launcher are complete, or not there at all.

    Args:
        on_gpu: the processes use GPUs, and so need LOCAL_RANK.

    Raises:
        RecipeError: every fault at once.
    """
    faults = [
        f"{name}={os.environ[name]} in the environment is not a whole number."
        for name in VARIABLES
        if os.environ.get(name) and name != "MASTER_ADDR" and launched(name) is None
    ]
    size, rank = launched("WORLD_SIZE"), launched("RANK")
    given = [name for name in ("RANK", "LOCAL_RANK") if os.environ.get(name)]
    if not os.environ.get("WORLD_SIZE") and given:
        faults.append(f"{_listed(given)} in the environment, but not WORLD_SIZE.")
    if size is not None and rank is not None and rank >= max(1, size):
        faults.append(
            f"RANK={rank} in the environment, but of {max(1, size)} processes the last is {max(0, size - 1)}."
        )
    missing = [name for name in (*_NEEDED, *(["LOCAL_RANK"] if on_gpu else [])) if not os.environ.get(name)]
    if size is not None and size > 1 and missing:
        faults.append(f"WORLD_SIZE={size} in the environment, but not {', '.join(missing)}.")
    raise_faults(RecipeError, [(fault, _hint()) for fault in faults])


def join_group(start: Callable[[], object]) -> None:
    """Wait until every process has called this; end at a signal, and after a while.

    Args:
        start: waits for the other processes.

    Raises:
        RecipeError: the others did not come, or cannot be reached.
    """
    errors: list[Exception] = []

    def wait() -> None:
        try:
            start()
        except Exception as error:  # raised below, in the main thread
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)  # it cannot be stopped, and ends with the process
    thread.start()
    _watch(thread)
    if errors:
        raise RecipeError(f"{_others()} cannot be joined: {first_line(errors[0])}", hint=_hint()) from errors[0]


def _watch(thread: threading.Thread) -> None:
    """Wait for a thread; signal handlers run in between.

    Raises:
        RecipeError: it takes longer than `JOIN_SECONDS`.
    """
    for tick in range(round(JOIN_SECONDS / _POLL_SECONDS)):
        thread.join(_POLL_SECONDS)
        if not thread.is_alive():
            return
        if tick + 1 == round(NOTICE_SECONDS / _POLL_SECONDS):
            waits = f"{_others()} must join; this one waits for at most {JOIN_SECONDS:.0f} seconds."
            warnings.warn(Notice(f"{waits} {_hint()}", everywhere=True), stacklevel=1)
    raise RecipeError(f"{_others()} did not join within {JOIN_SECONDS:.0f} seconds.", hint=_hint())


def _others() -> str:
    """Return what is waited for, with the variables that ask for it."""
    size = launched("WORLD_SIZE") or 1
    others = "the other process" if size == 2 else f"the other {size - 1} processes"
    return f"{_listed([name for name in VARIABLES if os.environ.get(name)])} in the environment: {others}"


def _listed(names: list[str]) -> str:
    return " ".join(f"{name}={os.environ[name]}" for name in names)


def _hint() -> str:
    given = " ".join(name for name in VARIABLES if name in os.environ)
    return f"If no launcher has started this command, an earlier one has left them there: unset {given}"
