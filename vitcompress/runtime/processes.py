"""Join the other processes and exchange values with them; thin functions over accelerate."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor

from vitcompress.errors import RecipeError
from vitcompress.recipe import Recipe, RunRecipe
from vitcompress.recipe.compose import to_dict
from vitcompress.runtime import signals
from vitcompress.runtime.console import launched
from vitcompress.runtime.joining import VARIABLES, check_launch, join_group
from vitcompress.runtime.precision import device_of, precision_of

T = TypeVar("T")

SHARED_MEMORY = "/dev/shm"  # Linux; other systems have no such limit

_UNTIE = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron"}
_WORKER_SECONDS = 30.0  # longer than a step takes, and as long as torch's launcher waits
_TIMEOUT_HOURS = 24  # the main process searches and writes alone; if a process dies, the launcher ends the others


def join(run: RunRecipe, logs: Path = Path()) -> Accelerator:
    """Join the processes of this run, or be the only one.

    Args:
        run: device and precision.
        logs: folder for trackers that write to disk.

    Raises:
        RecipeError: accelerate is configured to shard parameters, which would untie shared ones; or
            the other processes do not come.
    """
    cpu = device_of(run) == "cpu"  # accelerate would choose MPS, which has no float64
    check_launch(on_gpu=not cpu)
    timeout = datetime.timedelta(hours=_TIMEOUT_HOURS)
    if (launched("WORLD_SIZE") or 1) > 1 and not torch.distributed.is_initialized():
        backend = "gloo" if cpu else "nccl"  # as accelerate chooses, which takes the group that is there
        join_group(lambda: torch.distributed.init_process_group(backend, timeout=timeout))
    accelerator = _accelerator(
        cpu=cpu,
        mixed_precision="bf16" if precision_of(run) == "bf16" else "no",
        log_with=run.log_with,
        project_dir=logs if run.log_with else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    name = _UNTIE.get(accelerator.distributed_type)
    if name:
        raise RecipeError(
            f"{name} shards parameters, so blocks would no longer share them.",
            hint="Use accelerate's plain multi-GPU launch; a compressed model needs no sharding.",
        )
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if run.precision == "tf32" else "highest")
    return accelerator


def alone() -> Accelerator:
    """Return an accelerator without other processes and GPUs, for checks."""
    return _accelerator(cpu=True)


def _accelerator(**how: Any) -> Accelerator:
    if (launched("WORLD_SIZE") or 1) > 1:
        return Accelerator(**how)
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier call may have used another device or precision
    left_over = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:  # a launcher's variables would make accelerate look for a group of one process
        return Accelerator(**how)
    finally:
        os.environ.update(left_over)


def mean_of(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the mean of a tensor over all processes."""
    mean: Tensor = values if accelerator.num_processes == 1 else accelerator.reduce(values, reduction="mean")
    return mean


def gathered(value: T, accelerator: Accelerator) -> list[T]:
    """Return the values of all processes, in their order."""
    return [value] if accelerator.num_processes == 1 else list(gather_object([value]))


def from_main(value: T, accelerator: Accelerator) -> T:
    """Return the main process's value in every process."""
    if accelerator.num_processes == 1:
        return value
    box: list[Any] = [value]
    broadcast_object_list(box)
    received: T = box[0]
    return received


@contextmanager
def tracking(accelerator: Accelerator, recipe: Recipe, out: Path) -> Iterator[None]:
    """Send logged values to the recipe's tracker until the context ends."""
    tree = {f"{stage}.{name}": value for stage, fields in to_dict(recipe).items() for name, value in fields.items()}
    plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in tree.items()}
    accelerator.init_trackers(f"{out.stem}.logs", config=plain)
    try:
        yield
    finally:  # not end_training, which separates the processes: what follows is done together
        for tracker in accelerator.trackers:
            tracker.finish()


def shared_room() -> int | None:
    """Return the free bytes for tensors that processes share; None where nothing limits them."""
    if sys.platform != "linux":
        return None
    try:
        return shutil.disk_usage(SHARED_MEMORY).free if os.access(SHARED_MEMORY, os.W_OK) else 0
    except OSError:
        return 0


def outlive_signals(worker: int) -> None:
    """Let a data worker ignore signals, so that the current step can finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    sys.excepthook = _hide_broken_pipes
    signals.unblock()


def _end_later(number: int, frame: FrameType | None) -> None:
    """End this worker after a while; it may wait for a shard that never comes."""
    timer = threading.Timer(_WORKER_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _hide_broken_pipes(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Hide the errors that multiprocessing prints where the main process ends during a message."""
    if not issubclass(kind, (EOFError, OSError)):
        sys.__excepthook__(kind, error, trace)
