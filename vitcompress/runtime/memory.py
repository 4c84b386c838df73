"""Say how much memory is free, and keep what was freed."""

from __future__ import annotations

import ctypes
import sys

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device, in bytes; of the machine where the device shares it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES, _LARGEST_KEPT = 2**31 - 1, 2**30


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for what comes next: up to 2 GiB, in tensors up to 1 GiB.

    By default glibc returns large tensors to the system, and each new one takes its pages anew: up
    to a third of the processor time of a search. Does nothing where there is no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
