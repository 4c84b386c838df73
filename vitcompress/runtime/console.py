"""Show progress on stderr: a live bar on a terminal, a line every few seconds elsewhere.

Stdout is for results. Programs read `JsonLog` instead: the same events, one line of JSON each.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vitcompress.errors import VitcompressError, printable

SECONDS_BETWEEN_LINES = 5.0
STARTED_VARIABLE = "VITCOMPRESS_STARTED"  # set for the processes that the command starts
STARTED = float(os.environ.get(STARTED_VARIABLE, time.time()))  # start of the command, in seconds since 1970
MIN_STALL = 0.2  # share of the time spent waiting for images from which it is shown
LONG_TRAINING_SECONDS = 3600.0
_MIN_DONE = 0.01  # share of a task after which the time that it still takes is shown
_FORECAST_STEPS = 5  # measured steps before the length of a training is estimated; the first one warms up
LOG_VERSION = 1  # a change that breaks readers of the log raises it
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
}  # fields of each event, beside log_version, event and time


class Notice(UserWarning):
    """Something that the user should know, and that does not stop the command.

    Args:
        text: one line.
        everywhere: every process says it, not only the main one.
    """

    def __init__(self, text: str, *, everywhere: bool = False) -> None:
        super().__init__(text)
        self.everywhere = everywhere


@contextmanager
def notices(say: Callable[[str], None], *, is_main: bool = True) -> Iterator[None]:
    """Pass every new `Notice` to a function until the context ends.

    Args:
        say: prints one line.
        is_main: this process prints; otherwise it passes on only what every process says.
    """
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not isinstance(message, Notice):
            others(message, category, *where, **more)
        elif str(message) not in said and (is_main or message.everywhere):
            said.add(str(message))
            say(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        others, warnings.showwarning = warnings.showwarning, show
        yield


def launched(name: str) -> int | None:
    """Return a whole number that a launcher has set in the environment; None without one."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else None


def is_main() -> bool:
    """Whether this process prints and writes; launchers set RANK in the environment."""
    return not launched("RANK")


def local_processes() -> int:
    """Return the number of processes on this machine."""
    return launched("LOCAL_WORLD_SIZE") or 1


class Ticker(Protocol):
    """Receives every training step."""

    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        """Report one step.

        Args:
            done: finished share of the training, 0–1.
            loss: loss of the step.
            images_per_second: mean since the start.
            waiting: share of the time spent waiting for images, 0–1.
        """


class JsonLog:
    """Writes events as lines of JSON, flushed at once; a number that is not finite becomes null.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.stream, self.broken = stream, False
        self.last: dict[str, float] = {}

    def write(self, event: str, **fields: Any) -> None:
        """Write one line.

        Args:
            event: a key of `EVENTS`.
            fields: every field that `EVENTS` names, as JSON values.

        Raises:
            VitcompressError: the stream cannot be written to; later events are dropped.
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
        """Write one line every few seconds; the first and the last line are always written."""
        now = time.monotonic()
        if done < 1 and now - self.last.get(event, -math.inf) < SECONDS_BETWEEN_LINES:
            return
        self.last[event] = now
        self.write(event, done=done, **fields)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Reporter:
    """Shows progress on stderr; of several processes, only the main one does.

    Args:
        quiet: print nothing.
        log: the log for programs, written even when quiet; None for none.
    """

    def __init__(self, *, quiet: bool = False, log: JsonLog | None = None) -> None:
        self.console = Console(stderr=True, quiet=quiet or not is_main(), highlight=False, soft_wrap=True)
        self.log = log if is_main() else None

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(printable(text), markup=False, emoji=False)
        self.tell("note", text=text)

    def tell(self, event: str, **fields: Any) -> None:
        """Write an event of `EVENTS` to the log only."""
        if self.log:
            self.log.write(event, **fields)

    @contextmanager
    def counting(self, what: str, *, brief: bool = False) -> Iterator[Callable[[float], None]]:
        """Show the progress of a task until the context ends.

        Args:
            what: label of the progress bar.
            brief: without a terminal, print nothing for a task of a few seconds.

        Yields:
            A function to call with the finished share, 0–1.
        """
        with self._bar(what, brief=brief) as show:

            def count(done: float) -> None:
                show(done, "")
                if self.log:
                    self.log.now_and_then("progress", what=what, done=done)

            yield count

    @contextmanager
    def training(self, *, forecast: bool = False) -> Iterator[Ticker]:
        """Show the progress of a training until the context ends.

        Args:
            forecast: after the first steps, say so if the training will take more than an hour.
        """
        with self._bar("distil") as show:
            yield _Steps(show, self.log, self.say if forecast else None)

    @contextmanager
    def _bar(self, what: str, *, brief: bool = False) -> Iterator[Callable[[float, str], None]]:
        """Yield a function that shows the finished share, 0–1, and a text beside it."""
        if not self.console.is_terminal:
            yield _Lines(self.console, what, brief=brief).show
            return
        percent, text = TextColumn("{task.percentage:3.0f} %"), TextColumn("{task.fields[text]}")
        columns = (TextColumn(what), BarColumn(), percent, text, TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(what, total=1.0, text="")
            yield lambda done, text: progress.update(task, completed=done, text=text)


class _Steps:
    """Shows and logs training steps; warns once of a long training."""

    def __init__(
        self, show: Callable[[float, str], None], log: JsonLog | None, warn: Callable[[str], None] | None
    ) -> None:
        self.show, self.log, self.warn = show, log, warn
        self.first: tuple[float, float] | None = None  # time and share after the first step
        self.steps = 0

    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        stall = f" (waiting for images {waiting:.0%} of the time: --num-workers)" if waiting > MIN_STALL else ""
        loss_shown = round(loss, 3) + 0.0  # zero has no sign
        self.show(done, f"loss {loss_shown:.3f}  {images_per_second:.0f} images/s{stall}")
        if self.log:
            self.log.now_and_then("step", done=done, loss=loss, images_per_second=images_per_second, waiting=waiting)
        if self.warn is not None:
            self._forecast(done, self.warn)

    def _forecast(self, done: float, warn: Callable[[str], None]) -> None:
        """Estimate the length of the training from its first steps."""
        now = time.monotonic()
        if self.first is None:
            self.first = now, done
            return
        self.steps += 1
        start, share = self.first
        if self.steps < _FORECAST_STEPS or done <= share:
            return
        seconds = (now - start) * (1 - share) / (done - share)
        if seconds > LONG_TRAINING_SECONDS:
            warn(f"The training will take about {seconds / 3600:.1f} hours. --max-minutes N limits the whole command.")
        self.warn = None


class _Lines:
    """Prints one line every few seconds, where there is no terminal for a bar."""

    def __init__(self, console: Console, what: str, *, brief: bool) -> None:
        self.console, self.what, self.brief = console, what, brief
        self.start = self.last = time.monotonic()

    def show(self, done: float, text: str) -> None:
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES and (done < 1 or self.brief):
            return
        self.last = now
        left = f"{(now - self.start) * (1 - done) / done:.0f} s left" if done >= _MIN_DONE else ""
        parts = [f"{self.what} {100 * done:3.0f} %", text, left]
        self.console.print("  ".join(filter(None, parts)), markup=False)
