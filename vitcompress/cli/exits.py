"""End a command: exit codes, and one place where errors become messages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from vitcompress.errors import ExportError, VitcompressError, printable
from vitcompress.runtime.console import is_main, launched
from vitcompress.runtime.signals import TerminationError, await_launcher, unwrapped

EXIT_WRONG, EXIT_MISTAKE, EXIT_GATE, EXIT_INTERRUPTED, EXIT_NO_READER, EXIT_TERMINATED = 1, 2, 3, 130, 141, 143


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn an error into a message and an exit code.

    A user's mistake ends with 2 and a hint, a wrong export with 1, Ctrl-C with 130, SIGTERM with
    143.
    """
    try:
        with unwrapped():
            yield
    except (VitcompressError, ExportError) as error:
        if not is_main():
            await_launcher()  # the main process prints a mistake that all processes meet
        say(str(error), label="Error:", style="bold red")
        if hint := getattr(error, "hint", ""):
            say(hint, label="Hint:", style="bold")
        sys.exit(exit_code(error))
    except (KeyboardInterrupt, TerminationError) as error:
        if is_main():
            interrupted = f"Interrupted. {str(error) or 'No unfinished file is left behind.'}"
            say(interrupted if isinstance(error, KeyboardInterrupt) else f"Terminated. {error}".strip())
        sys.exit(exit_code(error))
    except RuntimeError as error:
        if not _lost_others(error):
            raise
        await_launcher()  # the process that failed says why
        say("The connection to the other processes is lost.", label="Error:", style="bold red")
        sys.exit(EXIT_WRONG)


def _lost_others(error: RuntimeError) -> bool:
    """Return whether an error means that another process of the run has ended."""
    text = str(error)
    by_gloo = "gloo" in text and any(f"Connection {how} by peer" in text for how in ("closed", "reset"))
    return (launched("WORLD_SIZE") or 1) > 1 and (by_gloo or type(error).__name__ == "DistBackendError")


def exit_code(error: BaseException) -> int:
    """Return the exit code that `user_errors` gives an exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, typer.Exit):
        return error.exit_code
    kinds = {VitcompressError: EXIT_MISTAKE, KeyboardInterrupt: EXIT_INTERRUPTED, TerminationError: EXIT_TERMINATED}
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), EXIT_WRONG)


def say(text: str, *, label: str = "", style: str = "") -> None:
    """Print a message on stderr.

    Args:
        text: one line or more.
        label: printed before the text.
        style: rich's style of the label.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if label:
        console.print(label, style=style, end=" ")
    console.print(printable(text), markup=False, emoji=False)
