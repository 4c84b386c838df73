"""Write results to stdout, and progress and events to where the user wants them."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import typer
import yaml
from rich.console import Console

import vitcompress
from vitcompress.artifact.paths import check_no_weights
from vitcompress.cli.exits import EXIT_GATE, EXIT_NO_READER, EXIT_WRONG, exit_code, say
from vitcompress.errors import ExportError, RecipeError, VitcompressError
from vitcompress.runtime.console import STARTED, STARTED_VARIABLE, JsonLog, Reporter, is_main, notices
from vitcompress.runtime.encoding import encodes
from vitcompress.runtime.signals import unwrapped

LOG_START = b'{"log_version"'


@contextmanager
def reporting(log_json: str | None, *, quiet: bool = False) -> Iterator[Reporter]:
    """Yield a reporter; with a log, write its start, its error and its end too.

    Args:
        log_json: path of the log; `-` for stderr, which then shows nothing else; None for no log.
        quiet: show no progress.

    Raises:
        RecipeError: the log cannot be written.
    """
    if log_json is None or not is_main():
        reporter = Reporter(quiet=quiet or log_json == "-")
        with notices(reporter.say if is_main() else say, is_main=is_main()):
            yield reporter
        return
    is_child = "RANK" in os.environ and STARTED_VARIABLE in os.environ  # the command that started it has begun the log
    stream = sys.stderr if log_json == "-" else _open_log(Path(log_json), append=is_child)
    log, code = JsonLog(stream), 0
    try:
        if not is_child:
            log.write("start", command=command_line(), version=vitcompress.__version__)
        reporter = Reporter(quiet=quiet or log_json == "-", log=log)
        with unwrapped(), notices(reporter.say):
            yield reporter
    except BaseException as error:
        code = exit_code(error)
        if not isinstance(error, (SystemExit, typer.Exit)):
            hint = getattr(error, "hint", "")
            log.write("error", kind=type(error).__name__, message=str(error), hint=hint)
            is_bug = code == EXIT_WRONG and not isinstance(error, ExportError)
            if log_json == "-" and not is_bug:  # a bug still shows its traceback
                sys.exit(code)
        raise
    finally:
        if not is_child:
            log.write("end", exit_code=code, seconds=round(time.time() - STARTED, 3))
        if stream is not sys.stderr:
            with suppress(OSError):  # a failed write has been reported
                stream.close()


def command_line() -> str:
    """Return the command as it can be typed into a shell again."""
    return shlex.join(["vitcompress", *sys.argv[1:]])


def _open_log(path: Path, *, append: bool) -> IO[str]:
    """Open a log; it may replace an older log, and nothing else.

    Raises:
        RecipeError: the file is not a log, or cannot be written.
    """
    check_no_weights("--log-json", path)
    try:
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                if file.read(len(LOG_START)) != LOG_START:
                    raise RecipeError(
                        f"--log-json {path} exists and is not a log; it would be overwritten.",
                        hint="Name another file.",
                    )
        if not append:
            path.write_bytes(b"")
        return path.open("a", encoding="utf-8")  # processes that this one starts append to it, too
    except OSError as error:
        raise RecipeError(
            f"--log-json {path}: {error.strerror}.", hint="Name a file in a folder that exists."
        ) from error


@contextmanager
def _written() -> Iterator[None]:
    """End with a message and code 2 where stdout is full, and with 141 where nobody reads it.

    Raises:
        VitcompressError: stdout is full.
    """
    try:
        yield
    except OSError as error:
        with open(os.devnull, "w") as nowhere:  # or the rest of the buffer would fail again at exit
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(EXIT_NO_READER)
        raise VitcompressError(f"The result cannot be written to stdout: {error.strerror}.") from error


def put(text: str, *, nl: bool = True) -> None:
    """Print a result.

    Args:
        text: one line or more.
        nl: end with a newline.
    """
    with _written():
        sys.stdout.write(text + "\n" * nl)  # typer.echo would write UTF-8 to a stream of ASCII
        sys.stdout.flush()


def put_yaml(tree: dict[str, Any]) -> None:
    """Print a result as YAML; characters that stdout cannot encode are escaped."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if not encodes(sys.stdout, text):
        text = yaml.safe_dump(tree, sort_keys=False)
    put(text, nl=False)


def put_json(tree: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Print a result as JSON."""
    put(json.dumps(tree, indent=2))


class Results(Console):
    """Stdout, for tables."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print like rich."""
        with _written():
            super().print(*args, **kwargs)

    def on_broken_pipe(self) -> None:
        """Let `_written` handle a closed pipe."""
        raise  # rich calls this in its except clause


def exit_on_missed(missed: list[str], reporter: Reporter) -> None:
    """Print the missed gates, and end with exit code 3 if there are any.

    Args:
        missed: one line per missed gate.
        reporter: its log gets them.
    """
    reporter.tell("gate", missed=missed)
    for line in missed:
        if not (reporter.log and reporter.log.stream is sys.stderr):
            say(f"missed: {line}")
    if missed:
        raise typer.Exit(EXIT_GATE)
