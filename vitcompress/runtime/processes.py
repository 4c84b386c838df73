"""Which process am I, and what do all of them agree on?  Thin functions over accelerate; one process pays nothing."""

from __future__ import annotations

import datetime
import os
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

T = TypeVar("T")

_UNTIE = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron"}
_WORKERS_SECONDS = 30.0  # more than a step takes, and as long as torch's launcher waits
_PATIENCE_HOURS = 24  # one process alone searches for a plan, and writes; a process that dies ends the others anyway


def join(run: RunRecipe, logs: Path = Path()) -> Accelerator:
    """Join the processes that were started for this run, or be the only one.

    Args:
        run: device and precision.
        logs: where trackers write that write to disk.

    Raises:
        RecipeError: accelerate is set up for something that would untie shared parameters.
    """
    accelerator = _accelerator(
        cpu=run.device == "cpu" or not torch.cuda.is_available(),  # accelerate would take what knows no float64 (MPS)
        mixed_precision="bf16" if run.precision == "bf16" else "no",
        log_with=run.log_with,
        project_dir=logs if run.log_with else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=_PATIENCE_HOURS))],
    )
    name = _UNTIE.get(accelerator.distributed_type)
    if name:
        raise RecipeError(
            f"{name} cuts parameters apart: what blocks share would no longer be one.",
            hint="Use accelerate's plain multi-GPU launch; a shared model needs no sharding.",
        )
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if run.precision == "tf32" else "highest")
    return accelerator


def alone() -> Accelerator:
    """No other process, and no GPU: for what is only checked."""
    return _accelerator(cpu=True)


def _accelerator(**how: Any) -> Accelerator:
    if "WORLD_SIZE" not in os.environ:  # an earlier call in this process may have had another device or precision
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(**how)


def mean_of(values: Tensor, accelerator: Accelerator) -> Tensor:
    """The mean of a tensor over all processes."""
    found: Tensor = values if accelerator.num_processes == 1 else accelerator.reduce(values, reduction="mean")
    return found


def gathered(value: T, accelerator: Accelerator) -> list[T]:
    """Everybody's value, in the order of the processes."""
    return [value] if accelerator.num_processes == 1 else list(gather_object([value]))


def from_main(value: T, accelerator: Accelerator) -> T:
    """The main process's value, in all of them."""
    if accelerator.num_processes == 1:
        return value
    box: list[Any] = [value]
    broadcast_object_list(box)
    found: T = box[0]
    return found


@contextmanager
def tracking(accelerator: Accelerator, recipe: Recipe, out: Path) -> Iterator[None]:
    """Send what is logged to the tracker that was asked for, under the name of `out`, until the context ends."""
    tree = {f"{stage}.{name}": value for stage, fields in to_dict(recipe).items() for name, value in fields.items()}
    plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in tree.items()}
    accelerator.init_trackers(f"{out.stem}.logs", config=plain)
    try:
        yield
    finally:  # not end_training, which parts the processes: what follows is done together
        for tracker in accelerator.trackers:
            tracker.finish()


def outlive_signals(worker: int) -> None:
    """Let a data worker live till its loader ends it: a signal to all of the group shall not cost the step begun."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    sys.excepthook = _hush


def _end_later(number: int, frame: FrameType | None) -> None:
    """End this process if its loader has not done so after a while: it may wait for a shard that never comes."""
    timer = threading.Timer(_WORKERS_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _hush(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say nothing of a main process that ended in the middle of a message: multiprocessing would show where."""
    if not issubclass(kind, (EOFError, OSError)):
        sys.__excepthook__(kind, error, trace)


def part(accelerator: Accelerator) -> None:
    """Part from the other processes: the run is over."""
    accelerator.end_training()
