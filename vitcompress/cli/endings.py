"""How does a command end?  Well, or with a message, an exit code and a last line in the log of events."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import vitcompress
from vitcompress.artifact.paths import check_no_weights
from vitcompress.errors import ExportError, RecipeError, VitcompressError, printable
from vitcompress.runtime import signals as interrupts
from vitcompress.runtime.console import STARTED, STARTED_VARIABLE, JsonLog, Reporter, is_main
from vitcompress.runtime.signals import TerminationError

LOG_BEGIN = b'{"log_version"'
EXIT_WRONG, EXIT_MISTAKE, EXIT_GATE, EXIT_INTERRUPTED, EXIT_NO_READER, EXIT_TERMINATED = 1, 2, 3, 130, 141, 143


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a user's mistake into a message, a hint and exit code 2; a wrong export into 1, Ctrl-C 130, SIGTERM 143."""
    try:
        with interrupts.undisguised():
            yield
    except VitcompressError as error:
        if not is_main():
            interrupts.wait_to_be_ended()  # what all processes stumble over is told once, by the main one
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print("Error:", style="bold red", end=" ")
        console.print(printable(str(error)), markup=False, emoji=False)
        if error.hint:
            console.print("Hint:", style="bold", end=" ")
            console.print(printable(error.hint), markup=False, emoji=False)
        sys.exit(EXIT_MISTAKE)
    except ExportError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(printable(f"Error: {error}"), markup=False, emoji=False)
        sys.exit(EXIT_WRONG)
    except KeyboardInterrupt as error:
        _last_words(f"Interrupted. {error}" if str(error) else "Interrupted; no unfinished file is left behind.")
        sys.exit(EXIT_INTERRUPTED)
    except TerminationError as error:
        _last_words(f"Terminated. {error}".strip())
        sys.exit(EXIT_TERMINATED)


@contextmanager
def reporting(log_json: str | None, *, quiet: bool = False) -> Iterator[Reporter]:
    """Someone to tell how it goes: people and, where there is a log, programs, which are told the end too.

    Args:
        log_json: a file, `-` for stderr, where people are told nothing then, or None.
        quiet: tell people nothing.

    Raises:
        RecipeError: the file cannot be written.
    """
    if log_json is None or not is_main():
        yield Reporter(quiet=quiet or log_json == "-")
        return
    if log_json != "-":
        _check_log(Path(log_json))
    started_by_us = "RANK" in os.environ and STARTED_VARIABLE in os.environ  # who started us has begun the log
    try:
        if log_json != "-" and not started_by_us:
            Path(log_json).write_bytes(b"")
        # to its end, where the processes that this one may start write, too
        stream = sys.stderr if log_json == "-" else open(log_json, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise RecipeError(
            f"--log-json {log_json}: {error.strerror}.", hint="Name a file in a folder that exists."
        ) from error
    log, code = JsonLog(stream), 0
    try:
        if not started_by_us:
            log.write("start", command=shlex.join(["vitcompress", *sys.argv[1:]]), version=vitcompress.__version__)
        with interrupts.undisguised():
            yield Reporter(quiet=quiet or log_json == "-", log=log)
    except BaseException as error:
        code = _exit_code(error)
        if not isinstance(error, (SystemExit, typer.Exit)):
            hint = getattr(error, "hint", "")
            log.write("error", kind=type(error).__name__, message=str(error), hint=hint)
            if log_json == "-" and (
                code != EXIT_WRONG or isinstance(error, ExportError)
            ):  # a bug's traceback is shown all the same
                sys.exit(code)
        raise
    finally:
        if not started_by_us:
            log.write("end", exit_code=code, seconds=round(time.time() - STARTED, 3))
        if stream is not sys.stderr:
            with suppress(OSError):  # what it could not take has been told
                stream.close()


@contextmanager
def _written() -> Iterator[None]:
    """Turn a full stdout into a message and exit code 2; one without a reader (`| head`), into 141.

    Raises:
        VitcompressError: it is full.
    """
    try:
        yield
    except OSError as error:
        with open(os.devnull, "w") as nowhere:  # or what is left in the buffer would fail again at the very end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(EXIT_NO_READER)
        raise VitcompressError(f"The result cannot be written to stdout: {error.strerror}.") from error


def put(text: str, *, nl: bool = True) -> None:
    """Print a result as it is.

    Args:
        text: of one line or more.
        nl: end it with another.
    """
    with _written():
        typer.echo(text, nl=nl)


class Results(Console):
    """Stdout, where tables go."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print as rich does."""
        with _written():
            super().print(*args, **kwargs)

    def on_broken_pipe(self) -> None:
        """Let the error through that rich is handling."""
        raise  # rich calls this in its except clause


def _check_log(path: Path) -> None:
    """Make sure that a log would take the place of nothing but an older log.

    Raises:
        RecipeError: it would.
    """
    check_no_weights("--log-json", path)
    try:
        if not path.is_file() or not path.stat().st_size:
            return
        with path.open("rb") as file:
            is_log = file.read(len(LOG_BEGIN)) == LOG_BEGIN
    except OSError:
        return  # opening it tells, with the reason
    if not is_log:
        raise RecipeError(
            f"--log-json {path} is there, and is no log: it would be overwritten.", hint="Name another file."
        )


def _exit_code(error: BaseException) -> int:
    """How `user_errors` ends the command."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, typer.Exit):
        return error.exit_code
    kinds = {VitcompressError: EXIT_MISTAKE, KeyboardInterrupt: EXIT_INTERRUPTED, TerminationError: EXIT_TERMINATED}
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), EXIT_WRONG)


def _last_words(text: str) -> None:
    if is_main():
        Console(stderr=True, highlight=False, soft_wrap=True).print(printable(text), markup=False)
