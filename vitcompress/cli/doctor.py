"""The command `doctor`: versions, devices, precisions, and missing extras.

torch is imported late, because it may be missing or broken when a user runs this command.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import vitcompress
from vitcompress.cli.output import put
from vitcompress.runtime.extras import EXTRAS, install_hint, missing_packages

_PACKAGES = ("torchvision", "timm", "accelerate", "safetensors", "huggingface-hub")
_COMPILERS = ("c++", "g++", "clang++", "cl")
_AMPERE = (8, 0)  # the first compute capability with tf32


def doctor() -> None:
    """Show what this machine can do: versions, devices, precisions and missing extras."""
    for line in lines():
        put(line)


def lines() -> list[str]:
    """Return ten lines, each a name and a text; a missing package never raises."""
    torch: Any
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch needs cannot be loaded
        torch, build = None, f"cannot be imported: {error}"
    else:
        build = f"{torch.__version__}, {_build(torch)}"
    absent = {extra: missing_packages(extra) for extra in EXTRAS}
    missing = (f"{' and '.join(names)} ({install_hint(extra)})" for extra, names in absent.items() if names)
    facts = {
        "vitcompress": vitcompress.__version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": build,
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "machine": f"{_cores()}, {_memory()}",
        "devices": ", ".join(_devices(torch)) if torch else "unknown",
        "precision": _precision(torch) if torch else "unknown",
        "--compile": _compiler(),
        "extras": ", ".join(extra for extra, names in absent.items() if not names) or "none",
        "missing": ", ".join(missing) or "nothing",
    }
    return [f"{name:<13}{text}" for name, text in facts.items()]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _build(torch: Any) -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for CPU"


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} of {os.cpu_count()} cores, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # Windows, and systems that do not tell
        return "memory unknown"
    return f"{total / 2**30:.0f} GiB of memory"


def _devices(torch: Any) -> Iterator[str]:
    yield f"cpu ({torch.get_num_threads()} threads)"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield f"cuda:{number} {gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)"


def _precision(torch: Any) -> str:
    from vitcompress.runtime.precision import cpu_capabilities, is_faster_in_bf16

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        has_tf32 = torch.cuda.get_device_capability() >= _AMPERE
        tf32 = "tf32" if has_tf32 else "no tf32 (compute capability 8.0)"
    else:
        has = cpu_capabilities()
        native = any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) if has else None
        tf32 = "no tf32 (needs a GPU)"
    auto = "bf16" if is_faster_in_bf16("cuda" if on_gpu else "cpu") else "fp32"
    how = {True: "in hardware", False: "emulated (slow)", None: "(whether in hardware is unknown)"}
    return f"auto is {auto}; bf16 {how[native]}, {tf32}"


def _compiler() -> str:
    path = next(filter(None, map(shutil.which, _COMPILERS)), None)
    return f"works (compiler: {path})" if path else "not on CPU: there is no C++ compiler (g++ or clang++)"
