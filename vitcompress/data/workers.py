"""Data workers: as many as the shared memory holds, and an error where one of them dies."""

from __future__ import annotations

import atexit
import math
import os
import platform
import queue
import shutil
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from typing import Any

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from vitcompress.errors import DataError, first_line
from vitcompress.runtime import signals
from vitcompress.runtime.console import Notice, local_processes
from vitcompress.runtime.processes import outlive_signals

_SHARED = "/dev/shm"  # Linux; other systems have no such limit
_PREFETCHED = 2  # batches of each worker that are in shared memory, as torch's default
_MARGIN = 0.9  # of the free room, which other programs use too
_PAGES = 1 << 16  # bytes that a batch takes beside its images
_MEMORY_SIGNALS = {signal.SIGKILL: "is the machine out of memory?", signal.SIGBUS: f"is {_SHARED} full?"}
_FEWER = "Give fewer --num-workers, or 0 to load images in the main process"


class _LostBatchError(Exception):
    """A worker could not pass on a batch."""


class Loader(DataLoader[Any]):
    """A data loader that ends with an error where a worker dies or cannot pass on a batch.

    torch's loader waits for ever for a batch that a worker could not send, and raises the error of
    a dead worker anywhere in the main process.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        options["worker_init_fn"] = _begin
        super().__init__(*args, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches.

        Raises:
            DataError: a worker died, or could not pass on a batch.
        """
        if self.num_workers == 0:
            yield from super().__iter__()
            return
        with _as_errors(()), _without_child_handler(), signals.blocked():
            batches = super().__iter__()
        workers = tuple(getattr(batches, "_workers", ()))
        kill = partial(_kill, workers)
        atexit.register(kill)  # where the caller fails; later, torch would wait for batches that nobody takes
        try:
            with _as_errors(workers):
                yield from batches
        except Exception:
            kill()
            raise
        finally:
            atexit.unregister(kill)


def fitting_workers(number: int, num_images: int, image_bytes: int, held: int) -> int:
    """Return how many workers the shared memory has room for; say so where they are fewer.

    Args:
        number: number of workers to use if there is room.
        num_images: images per batch.
        image_bytes: size of an image.
        held: number of batches that the main process holds at once.
    """
    room = shared_room()
    if room is None or number == 0:
        return number
    free, batch = room * _MARGIN / local_processes(), num_images * image_bytes + _PAGES
    fitting = max(0, min(number, math.floor((free - held * batch) / (_PREFETCHED * batch))))
    if fitting < number:
        needed = (held + _PREFETCHED * number) * batch * local_processes() / _MARGIN
        warnings.warn(
            Notice(
                f"{_SHARED} has {_megabytes(room)} free; for batches of {num_images} images, {number} data "
                f"worker{'s need' if number > 1 else ' needs'} {_megabytes(needed)}: using {fitting}. More room "
                "(docker run --shm-size) or a smaller --batch-size loads images faster."
            ),
            stacklevel=2,
        )
    return fitting


def shared_room() -> int | None:
    """Return the free bytes for tensors that processes share; None where nothing limits them."""
    if platform.system() != "Linux":
        return None
    try:
        return shutil.disk_usage(_SHARED).free if os.access(_SHARED, os.W_OK) else 0
    except OSError:
        return 0


def _megabytes(size: float) -> str:
    return f"{math.ceil(size / 1e6):,} MB"


def _begin(worker: int) -> None:
    """Prepare a worker: it outlives signals, and passes on why it cannot send a batch."""
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]  # otherwise printed, and the batch is lost
    outlive_signals(worker)


def _send_error(results: Any, error: Exception, item: tuple[int, Any]) -> None:
    """Send an error in place of a batch; called in the thread that sends batches."""
    results.put((item[0], ExceptionWrapper((_LostBatchError, _LostBatchError(str(error)), None), "in a data worker")))


def _kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        worker.kill()


@contextmanager
def _without_child_handler() -> Iterator[None]:
    """Undo torch's handler of ended children: it would raise anywhere, in the middle of a step too.

    torch also looks for dead workers every five seconds that it waits for a batch.
    """
    number = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(number) if number else None
    try:
        yield
    finally:
        handler = signal.getsignal(number) if number else None
        if number and handler is not before and callable(handler):
            signal.signal(number, before or signal.SIG_DFL)


@contextmanager
def _as_errors(workers: Sequence[Any]) -> Iterator[None]:
    """Turn the failure of a worker into an error, or into a signal's exception where one came.

    Raises:
        DataError: a worker could not start, died, or could not pass on a batch.
    """
    try:
        yield
    except _LostBatchError as error:
        reason = _last_line(error)
        raise DataError(f"A data worker cannot pass on a batch: {reason}.", hint=_hint(reason)) from error
    except (RuntimeError, OSError, EOFError, queue.Empty) as error:
        if isinstance(error, (ConnectionError, EOFError)):  # a worker that is about to have ended
            wait([worker.sentinel for worker in workers], timeout=1)
        dead = [worker for worker in workers if not worker.is_alive()]
        if signals.received() and dead:
            raise signals.pending() from error
        if dead:
            raise DataError(f"A data worker {_end(dead[0].exitcode)}", hint=f"{_FEWER}.") from error
        if workers and isinstance(error, RuntimeError):
            raise  # a mistake in the code
        reason = _last_line(error) if "Original Traceback" in str(error) else first_line(error)
        raise DataError(f"The data workers cannot be used: {reason}.", hint=f"{_FEWER}.") from error


def _last_line(error: Exception) -> str:
    """Return the message of an error that torch has passed on from a worker, with its traceback."""
    line = str(error).strip().splitlines()[-1]
    return line.partition("Error: ")[2] or line


def _end(code: int) -> str:
    """Return how a process has ended, as the end of a sentence."""
    if code >= 0:
        return f"has ended with exit code {code}."
    name = signal.Signals(-code)
    return f"was killed by {name.name}{': ' + _MEMORY_SIGNALS[name] if name in _MEMORY_SIGNALS else '.'}"


def _hint(reason: str) -> str:
    if "open files" in reason:
        return f"{_FEWER}, or raise the limit of open files (ulimit -n)."
    return f"{_FEWER}, or give {_SHARED} more room (docker run --shm-size)."
