"""What happens at Ctrl-C, and at SIGTERM of schedulers?  The command ends at once, or once its state is kept."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_LAUNCHERS_SECONDS = 10.0  # more than one process takes to end, on a busy machine


class TerminationError(BaseException):
    """SIGTERM came; no mistake and no bug, so nothing but the command line may catch it. Its text says what is kept."""


_asked: list[int] = []  # signals that came
_raised = False  # whether one of them has become an exception
_deferred: frozenset[int] = frozenset()


def watch() -> None:
    """Let SIGTERM end this process by a `TerminationError`, so that half-written files are removed, and Ctrl-C too."""
    global _raised
    _asked.clear()
    _raised = False
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    global _raised
    again = number == signal.SIGINT and number in _asked  # a launcher may send SIGTERM twice, a user means it
    _asked.append(number)
    if again or number not in _deferred:
        _raised = True
        raise ending()


@contextmanager
def undisguised() -> Iterator[None]:
    """Let a signal's exception be seen as itself where a library has made another of it.

    numpy and torch, interrupted while they are being imported, end in a RecursionError or an ImportError.
    """
    try:
        yield
    except Exception as error:
        if _raised:
            raise ending() from error
        raise


def ending() -> BaseException:
    """What the first signal that came ends the process by."""
    return KeyboardInterrupt() if signal.SIGINT in _asked[:1] else TerminationError()


@contextmanager
def deferring(*, ctrl_c: bool) -> Iterator[Callable[[], bool]]:
    """Let SIGTERM wait: yields a function that tells whether it came; if it did, the block ends by it.

    Args:
        ctrl_c: let the first Ctrl-C wait too; the second one ends the process at once.
    """
    global _deferred
    before, _deferred = _deferred, frozenset((signal.SIGTERM, signal.SIGINT) if ctrl_c else (signal.SIGTERM,))
    try:
        yield lambda: bool(_asked)
    finally:
        _deferred = before
    if _asked:
        raise ending()


def wait_to_be_ended() -> None:
    """Sleep for some seconds, in which a launcher ends this process if the one that failed first was another."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_LAUNCHERS_SECONDS)
