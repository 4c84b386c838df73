"""Start the processes of a run: one per device of this machine, unless a launcher has started them.

vitcompress compress …                            one process per GPU of this machine
accelerate launch -m vitcompress compress …       as accelerate is set up: one machine or many
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

import torch

from vitcompress.errors import TrainingError
from vitcompress.recipe import RunRecipe
from vitcompress.runtime.console import STARTED, STARTED_VARIABLE, launched

_EXPLAINED_CODES = (2, 3, 130, 143)  # exit codes whose reason the process itself has printed


def num_launched() -> int:
    """Return the number of launched processes on all machines; 1 where nothing was launched."""
    return launched("WORLD_SIZE") or 1


def num_processes(run: RunRecipe) -> int:
    """Return the number of processes of a run on all machines, launched or still to be started."""
    if launched("WORLD_SIZE"):
        return num_launched()
    if run.num_processes is not None:
        return run.num_processes
    return max(1, torch.cuda.device_count()) if run.device in ("auto", "cuda") else 1


def must_start(run: RunRecipe) -> bool:
    """Whether the command must start processes: it needs several, and none were launched."""
    return not os.environ.get("WORLD_SIZE") and num_processes(run) > 1


def start(run: RunRecipe, arguments: Sequence[str]) -> int:
    """Start the processes of a run with torch's launcher, and wait for their end.

    `accelerate launch` uses the same launcher, but starts one process where there is no GPU.

    Args:
        run: the number of processes.
        arguments: the command line's arguments.

    Returns:
        Exit code of the first process that failed, or 0.

    Raises:
        TrainingError: a process died.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # each process prints its own messages
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    number = num_processes(run)
    threads = max(1, (os.cpu_count() or 1) // number)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # otherwise each process would use every core
    os.environ[STARTED_VARIABLE] = str(STARTED)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=number, run_id=str(uuid.uuid4()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "vitcompress", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in _EXPLAINED_CODES:
            return int(failure.exitcode)
        died = f"was killed by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else "failed"
        raise TrainingError(
            f"Process {rank} of {number} {died}, and the others with it.",
            hint="--resume continues from the last saved state, if there is one.",
        ) from error
    except SignalException as error:  # the processes got the signal too, and have ended
        return 128 + int(error.sigval)
    return 0
