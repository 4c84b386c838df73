"""End the command at Ctrl-C and at SIGTERM, at once or after the state of a training is saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_LAUNCHER_SECONDS = 10.0  # longer than a process takes to end on a busy machine
_RETRY_SECONDS = 0.01  # a destructor is over by then
_DELIBERATE_SECONDS = 2.0  # a launcher or a process group may send SIGTERM twice in less
_WATCHED = frozenset((signal.SIGTERM, signal.SIGINT))


class TerminationError(BaseException):
    """SIGTERM was received; only the command line may catch it. Its message says what is kept."""


_received: list[int] = []  # signals, in order
_first_at = 0.0  # when the first one came
_raised = False  # whether one of them has become an exception
_deferred: frozenset[int] = frozenset()
_process = 0  # the one that watches; its children inherit the handlers


def watch() -> None:
    """Turn SIGTERM and Ctrl-C into exceptions, so that half-written files are removed."""
    global _raised, _process
    _received.clear()
    _raised = False
    _process = os.getpid()
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)
    signal.signal(signal.SIGTERM, _receive)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _receive)


class _Hook:
    """Raise a signal's exception again that a destructor has swallowed; it would be lost."""

    def __init__(self, others: Callable[[sys.UnraisableHookArgs], object]) -> None:
        self._others = others

    def __call__(self, args: sys.UnraisableHookArgs) -> None:
        if not isinstance(args.exc_value, (KeyboardInterrupt, TerminationError)):
            self._others(args)
            return
        timer = threading.Timer(_RETRY_SECONDS, os.kill, (os.getpid(), _received[0] if _received else signal.SIGINT))
        timer.daemon = True
        timer.start()


def _receive(number: int, frame: FrameType | None) -> None:
    global _raised, _first_at
    if os.getpid() != _process:  # a data worker that has not set its own handlers yet
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    now = time.monotonic()
    late = number == signal.SIGINT or now - _first_at > _DELIBERATE_SECONDS
    again = number in _received and late  # a second Ctrl-C, or SIGTERM after a while, is deliberate
    _first_at = _first_at if _received else now
    _received.append(number)
    if again or number not in _deferred:
        _raised = True
        raise pending()


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise a signal's exception where a library has turned it into another one.

    numpy and torch, interrupted during their import, raise a RecursionError or an ImportError.
    """
    try:
        yield
    except Exception as error:
        if _raised:
            raise pending() from error
        raise


def pending() -> BaseException:
    """Return the exception of the first signal that was received."""
    return KeyboardInterrupt() if signal.SIGINT in _received[:1] else TerminationError()


def received() -> bool:
    """Return whether a signal has come."""
    return bool(_received)


@contextmanager
def blocked() -> Iterator[None]:
    """Hold back signals while processes start; they inherit this, and call `unblock`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """Let a started process receive signals; its handlers are set."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)


@contextmanager
def deferring(*, ctrl_c: bool) -> Iterator[Callable[[], bool]]:
    """Defer SIGTERM until the context ends; a second one, two seconds later, ends it at once.

    Args:
        ctrl_c: defer the first Ctrl-C too; the second one ends the process at once.

    Yields:
        A function that tells whether a signal was received.
    """
    global _deferred
    before, _deferred = _deferred, frozenset((signal.SIGTERM, signal.SIGINT) if ctrl_c else (signal.SIGTERM,))
    try:
        yield lambda: bool(_received)
    finally:
        _deferred = before
    if _received:
        raise pending()


def await_launcher() -> None:
    """Let the launcher end this process if another failed first."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_LAUNCHER_SECONDS)
