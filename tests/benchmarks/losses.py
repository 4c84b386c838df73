"""Which losses of weight distillation help, at equal images?

Every combination of the three token losses on top of the logits, on the built-in model with all
blocks sharing one set of matrices, by its own recipe but for the steps, over three seeds. Two runs
at a time, one thread each.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

import vitcompress
from vitcompress.recipe.compose import build

ADDED = {"hidden": 1.0, "attention": 1.0, "hidden_relation": 0.1}  # the paper's weights; ours for hidden
SEEDS = (0, 1, 2)
STEPS = 150


def run() -> str:
    """The table of all combinations, best first."""
    combinations = [
        {"logits": 1.0, **{name: ADDED[name] for name in chosen}}
        for size in range(len(ADDED) + 1)
        for chosen in itertools.combinations(ADDED, size)
    ]
    jobs = list(itertools.product(range(len(combinations)), SEEDS))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        top1 = list(pool.map(train, [combinations[index] for index, _ in jobs], [seed for _, seed in jobs]))
    results = [(losses, top1[i * len(SEEDS) : (i + 1) * len(SEEDS)]) for i, losses in enumerate(combinations)]
    lines = ["| losses | top-1 by seed | mean | spread |", "|---|---|---:|---:|"]
    for losses, values in sorted(results, key=lambda result: -statistics.mean(result[1])):
        names = " + ".join(f"{weight:g} {name}" for name, weight in losses.items())
        shown = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {names} | {shown} | {statistics.mean(values):.2f} % | {max(values) - min(values):.2f} |")
    return "\n".join([*lines, "", f"{STEPS} steps of 64 images, `--share 12`; top-1 on 5,000 test images."])


def train(losses: dict[str, float], seed: int) -> float:
    """Top-1 in percent of the built-in model, compressed by these losses."""
    torch.set_num_threads(1)
    flags = {
        "model": "fashion_vit", "share": 12, "steps": STEPS, "seed": seed, "num_workers": 0, "device": "cpu",
        "loss": [f"{name}={weight}" for name, weight in losses.items()],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report = vitcompress.compress(build(flags), Path(folder) / "mini.safetensors")
    assert report.accuracy is not None
    assert report.accuracy.student_top1 is not None
    return report.accuracy.student_top1
