"""What does the user see while it runs?  A live bar on a terminal; plain lines every few seconds in a pipe or a CI log.

All of it goes to stderr: stdout is for results.  Programs read `JsonLog` instead: the same events, a line of JSON each.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vitcompress.errors import VitcompressError, printable

SECONDS_BETWEEN_LINES = 5.0
STARTED_VARIABLE = "VITCOMPRESS_STARTED"  # for processes that the command starts
STARTED = float(os.environ.get(STARTED_VARIABLE, time.time()))  # of the command, in seconds since 1970
WORTH_SAYING = 0.2  # share of the time spent waiting for images
LOG_VERSION = 1  # of what a line of the log means; a change that breaks readers raises it
EVENTS: Mapping[str, tuple[str, ...]] = {
    "start": ("command", "version"),
    "note": ("text",),
    "plan": ("model", "groups", "size"),
    "progress": ("what", "done"),
    "step": ("done", "loss", "images_per_second", "waiting"),
    "evaluate": ("accuracy",),
    "wrote": ("file", "bytes"),
    "gate": ("missed",),
    "error": ("kind", "message", "hint"),
    "end": ("exit_code", "seconds"),
}  # each with its fields, beside log_version, event and time


def is_main() -> bool:
    """Is this the process that prints and writes?  Launchers tell by the environment, before accelerate has looked."""
    return int(os.environ.get("RANK", "0")) == 0


def local_processes() -> int:
    """How many processes run on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Ticker(Protocol):
    """Told of every training step."""

    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        """Report one step.

        Args:
            done: share of the training that is over, 0–1.
            loss: of the step.
            images_per_second: since the start.
            waiting: share of the time that went by waiting for images, 0–1.
        """


class JsonLog:
    """Events, a line of JSON each, flushed at once; what is not finite is null.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.stream, self.broken = stream, False
        self.last: dict[str, float] = {}

    def write(self, event: str, **fields: Any) -> None:
        """Write one line.

        Args:
            event: a key of `EVENTS`.
            fields: all that `EVENTS` names, JSON values.

        Raises:
            VitcompressError: it cannot be written; nothing more is then.
        """
        assert fields.keys() == set(EVENTS[event]), event
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = {"log_version": LOG_VERSION, "event": event, "time": now, **fields}
        text = json.dumps({name: _finite(value) for name, value in line.items()}, allow_nan=False)
        try:
            if not self.broken:
                self.stream.write(text + "\n")
                self.stream.flush()
        except OSError as error:
            self.broken = True
            name = getattr(self.stream, "name", "")
            raise VitcompressError(
                f"--log-json {name}: {error.strerror}.", hint="Name a file with room for it."
            ) from error

    def now_and_then(self, event: str, *, done: float, **fields: Any) -> None:
        """Write one line, unless the last of this event was less than seconds ago; the first and the end always."""
        now = time.monotonic()
        if done < 1 and now - self.last.get(event, -math.inf) < SECONDS_BETWEEN_LINES:
            return
        self.last[event] = now
        self.write(event, done=done, **fields)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Reporter:
    """Says what is going on, on stderr; of several processes, the main one alone.

    Args:
        quiet: say nothing.
        log: for programs, quiet or not; None for none.
    """

    def __init__(self, *, quiet: bool = False, log: JsonLog | None = None) -> None:
        self.console = Console(stderr=True, quiet=quiet or not is_main(), highlight=False, soft_wrap=True)
        self.log = log if is_main() else None

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(printable(text), markup=False, emoji=False)
        self.tell("note", text=text)

    def tell(self, event: str, **fields: Any) -> None:
        """Put an event of `EVENTS` into the log; people are not told."""
        if self.log:
            self.log.write(event, **fields)

    @contextmanager
    def counting(self, what: str, *, brief: bool = False) -> Iterator[Callable[[float], None]]:
        """Show how far something has come until the context ends; to be told the share that is done, 0–1.

        Args:
            what: it is.
            brief: without a terminal, do not say that it is over unless it took a while.
        """

        def logged(show: Callable[[float], None]) -> Callable[[float], None]:
            def count(done: float) -> None:
                show(done)
                if self.log:
                    self.log.now_and_then("progress", what=what, done=done)

            return count

        if not self.console.is_terminal:
            yield logged(_Lines(self.console, what, brief=brief).count)
            return
        with Progress(TextColumn(what), BarColumn(), TimeRemainingColumn(), console=self.console) as progress:
            task = progress.add_task(what, total=1.0)
            yield logged(lambda done: progress.update(task, completed=done))

    @contextmanager
    def training(self) -> Iterator[Ticker]:
        """Show the progress of a training run until the context ends."""
        if not self.console.is_terminal:
            yield _Logged(_Lines(self.console, "distil"), self.log)
            return
        columns = (
            TextColumn("distil"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:.0f} images/s{task.fields[stall]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            yield _Logged(_Bar(progress), self.log)


class _Logged:
    """A ticker that puts a step into the log, too, now and then."""

    def __init__(self, shown: Ticker, log: JsonLog | None) -> None:
        self.shown, self.log = shown, log

    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        self.shown.step(done=done, loss=loss, images_per_second=images_per_second, waiting=waiting)
        if self.log:
            self.log.now_and_then("step", done=done, loss=loss, images_per_second=images_per_second, waiting=waiting)


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID = progress.add_task("distil", total=1.0, loss=float("nan"), speed=0.0, stall="")

    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        stall = _stall(waiting)
        self.progress.update(self.task, completed=done, loss=_shown(loss), speed=images_per_second, stall=stall)


class _Lines:
    def __init__(self, console: Console, what: str, *, brief: bool = False) -> None:
        self.console, self.what, self.brief = console, what, brief
        self.start = self.last = time.monotonic()

    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        self.count(done, f"loss {_shown(loss):.3f}  {images_per_second:.0f} images/s{_stall(waiting)}")

    def count(self, done: float, text: str = "") -> None:
        """Print one line now and then."""
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES and (done < 1 or self.brief):
            return
        self.last = now
        left = (now - self.start) * (1 - done) / done if done else float("nan")
        parts = [f"{self.what} {100 * done:3.0f} %", text, f"{left:.0f} s left"]
        self.console.print("  ".join(filter(None, parts)), markup=False)


def _shown(loss: float) -> float:
    """A loss as three decimals show it: what rounds to nothing has no sign."""
    return round(loss, 3) + 0.0


def _stall(waiting: float) -> str:
    """What to say where the images come too slowly; empty where they do not."""
    return f" (waiting for images {waiting:.0%} of the time: --num-workers)" if waiting > WORTH_SAYING else ""
