"""On which device does this machine train, and in which precision? Needs torch alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vitcompress.recipe import RunRecipe


def precision_of(run: RunRecipe) -> str:
    """Return the precision of training: `auto` is bf16 where that is faster."""
    if run.precision != "auto":
        return run.precision
    return "bf16" if is_faster_in_bf16(device_of(run)) else "fp32"


def device_of(run: RunRecipe) -> str:
    """Return the type of device to train on: `cuda` or `cpu`."""
    return "cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu"


def is_faster_in_bf16(device: str) -> bool:
    """Whether a type of device computes faster in bf16 than in fp32.

    On a CPU with avx512_bf16 and without avx512_fp16, a forward pass of DeiT-Tiny takes 0.59 and a
    training step 0.67 of the time in fp32. Intel's CPUs that have both leave bf16 to AMX; where a
    virtual machine hides AMX, the two take 1.6 and 1.9 times as long as in fp32.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = cpu_capabilities()
    lacks_amx = has.get("avx512_fp16") and str(has.get("cpu_name")).startswith("Intel")
    return device == "cpu" and bool(has.get("amx_bf16") or (has.get("avx512_bf16") and not lacks_amx))


def cpu_capabilities() -> Mapping[str, Any]:
    """Return torch's names of what the CPU can do.

    Empty before torch 2.10, which has no such function.
    """
    ask = getattr(torch.cpu, "get_capabilities", None)
    return ask() if ask else {}
