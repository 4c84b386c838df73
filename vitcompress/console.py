"""What does the user see while it runs?  A live bar on a terminal; plain lines every few seconds in a pipe or a CI log.

All of it goes to stderr: stdout is for results.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0
STARTED_VARIABLE = "VITCOMPRESS_STARTED"  # for processes that the command starts
STARTED = float(os.environ.get(STARTED_VARIABLE, time.time()))  # of the command, in seconds since 1970


WORTH_SAYING = 0.2  # share of the time spent waiting for images


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


class Reporter:
    """Says what is going on, on stderr; of several processes, the main one alone.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet or not is_main(), highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, emoji=False)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[float], None]]:
        """Show how far something has come until the context ends; to be told the share that is done, 0–1."""
        if not self.console.is_terminal:
            lines = _Lines(self.console, what)
            yield lines.count
            return
        with Progress(TextColumn(what), BarColumn(), TimeRemainingColumn(), console=self.console) as progress:
            task = progress.add_task(what, total=1.0)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def training(self) -> Iterator[Ticker]:
        """Show the progress of a training run until the context ends."""
        if not self.console.is_terminal:
            yield _Lines(self.console, "distil")
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
            yield _Bar(progress)


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID = progress.add_task("distil", total=1.0, loss=float("nan"), speed=0.0, stall="")

    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        stall = _stall(waiting)
        self.progress.update(self.task, completed=done, loss=loss, speed=images_per_second, stall=stall)


class _Lines:
    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what = console, what
        self.start = self.last = time.monotonic()

    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        self.count(done, f"loss {loss:.3f}  {images_per_second:.0f} images/s{_stall(waiting)}")

    def count(self, done: float, text: str = "") -> None:
        """Print one line now and then."""
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES and done < 1:
            return
        self.last = now
        left = (now - self.start) * (1 - done) / done if done else float("nan")
        parts = [f"{self.what} {100 * done:3.0f} %", text, f"{left:.0f} s left"]
        self.console.print("  ".join(filter(None, parts)), markup=False)


def _stall(waiting: float) -> str:
    """What to say where the images come too slowly; empty where they do not."""
    return f" (waiting for images {waiting:.0%} of the time: --num-workers)" if waiting > WORTH_SAYING else ""
