"""What happens at SIGTERM, which CI and schedulers send?  The command ends at once, or when its state is saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_LAUNCHERS_SECONDS = 10.0  # more than one process takes to end, on a busy machine


class TerminationError(BaseException):
    """SIGTERM came; no mistake and no bug, so nothing but the command line may catch it. Its text says what is kept."""


_asked = False
_deferred = False


def watch() -> None:
    """Let SIGTERM end this process by a `TerminationError`, so that half-written files are removed."""
    global _asked
    _asked = False
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    if not _deferred:
        raise TerminationError


@contextmanager
def deferring() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM wait: yields a function that tells whether it came. Nested blocks are one."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield lambda: _asked
    finally:
        _deferred = before


def wait_to_be_ended() -> None:
    """Sleep for some seconds, in which a launcher ends this process if the one that failed first was another."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_LAUNCHERS_SECONDS)
