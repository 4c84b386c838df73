"""How large are exports, how near to the artifact, and how fast, next to plain timm?

DeiT-Tiny, where its weights are; else random ones. Its transformations are moved from where they
start, as training does: at the identity they cost nothing. Processor times alternate in one process
on one thread.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitcompress
from tests.benchmarks.loading import WEIGHTS, make
from vitcompress import export
from vitcompress.export.onnx import open_session
from vitcompress.export.parity import Run

ARCHITECTURE, SHARE = "deit_tiny_patch16_224", 2
STORES, FORMATS = ("source", "fp16", "int8", "int4"), ("onnx", "pt2")
BATCHES, ROUNDS = (1, 8), 15
MOVED = 0.05


def opened(path: Path) -> Run:
    """Run an export."""
    if path.suffix == ".onnx":
        return open_session(path, threads=1)
    module: Run = torch.export.load(path).module()
    return module


def ratios(runs: dict[str, Callable[[Tensor], Any]], batch: int) -> dict[str, float]:
    """Medians of processor time over the first one's; after a round that does not count."""
    images = torch.randn(batch, 3, 224, 224)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for name, call in runs.items():
                start = time.process_time()
                call(images)
                if turn:
                    seconds[name].append(time.process_time() - start)
    first, *_ = (statistics.median(each) for each in seconds.values())
    return {name: statistics.median(each) / first for name, each in seconds.items()}


def run() -> str:
    """The table."""
    torch.set_num_threads(1)
    rows: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Callable[[Tensor], Any]] = {}
        for store in STORES:
            path = Path(folder) / f"{store}.safetensors"
            teacher = make(path, ARCHITECTURE, SHARE, store, WEIGHTS if WEIGHTS.is_file() else None, moved=MOVED)
            runs.setdefault("timm's model, whole", teacher)
            runs[f"artifact, {store}"] = vitcompress.load(path)
            rows[f"artifact, {store}"] = [f"{path.stat().st_size / 1e6:.2f}", "", ""]
            for to in FORMATS:
                out = path.with_suffix(f".{to}")
                done = export.export(path, to, out)
                runs[f"{to}, {store}"] = opened(out)
                size, ratio = out.stat().st_size, out.stat().st_size / path.stat().st_size
                apart = done.max_difference / done.largest_output
                rows[f"{to}, {store}"] = [f"{size / 1e6:.2f}", f"{ratio:.3f}", f"{apart:.0e}"]
        times = [ratios(runs, batch) for batch in BATCHES]
    lines = [
        f"| | MB | of the artifact | difference | {' | '.join(f'time, batch {batch}' for batch in BATCHES)} |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {' | '.join(rows.get(name, [''] * 3))} | {' | '.join(f'{each[name]:.2f}' for each in times)} |"
            for name in runs
        ),
    ]
    note = "Difference: the largest of the outputs, over the largest output. Time: of the processor, over timm's model."
    return "\n".join([*lines, "", f"{note} Medians of {ROUNDS}."])
