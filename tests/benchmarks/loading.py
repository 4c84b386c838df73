"""How long does an artifact take to load, and how much memory does it need? Against bare timm.

Against what loads nothing but the same bytes and checks none of them: timm's `create_model` and
safetensors' `load_file`. Times alternate in one process, after a round that does not count. Memory
is that of a fresh process for each, after its imports: what its resident set grew by, and by how
much at its peak. DeiT-Base has random weights; DeiT-Tiny is there where its weights are.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

import vitcompress
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.write import write
from vitcompress.plans.make import make_plan
from vitcompress.pretrained.data_config import data_config
from vitcompress.pretrained.load import load_pretrained
from vitcompress.pretrained.resolve import Source
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.recipe import ModelRecipe, PlanRecipe
from vitcompress.surgery import apply_plan

WEIGHTS = Path("../shared/data/deit_tiny.safetensors")
ROWS = (
    ("deit_base_patch16_224", 12, "source"),
    ("deit_base_patch16_224", 1, "source"),
    ("deit_base_patch16_224", 12, "int8"),
    ("deit_tiny_patch16_224", 2, "source"),
)
ROUNDS = 7


def make(
    path: Path, architecture: str, share: int, store: str, checkpoint: Path | None, *, moved: float = 0.0
) -> nn.Module:
    """Write a student of timm's model.

    Args:
        path: the artifact.
        architecture: timm's name.
        share: blocks per group.
        store: a key of `STORES`.
        checkpoint: None for random weights.
        moved: standard deviation of what is added to transformations, as if they had been trained.

    Returns:
        timm's model, in eval mode.
    """
    torch.manual_seed(0)
    source: dict[str, Any] = {
        "name": architecture,
        "architecture": architecture,
        "model_args": {},
        "pretrained_cfg": {},
    }
    made = Source(architecture, architecture, checkpoint=checkpoint)
    model = load_pretrained(made) if checkpoint else timm.create_model(architecture).eval()
    plan = make_plan(model, PlanRecipe(share=share), name=architecture, store=store)
    config = data_config(model, ModelRecipe(architecture))
    student = copy.deepcopy(model)
    apply_plan(student, plan)
    student.eval()
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "mix_" in name or "token_conv" in name:
                p += moved * torch.randn_like(p)
    stored = stored_tensors(student, store)
    round_to(student, stored, store)
    manifest = Manifest(source, "", plan, config, {}, {"schema_version": 1}, {}, store=store)
    write(path, student, manifest, torch.randn(1, *config["input_size"]), stored=stored)
    return model


def ours(path: Path, architecture: str) -> object:
    """Load an artifact."""
    return vitcompress.load(path)


def plain(path: Path, architecture: str) -> object:
    """Return timm's model with random weights and the artifact's tensors, not combined."""
    return timm.create_model(architecture), load_file(path)


LOADERS: dict[str, Callable[[Path, str], object]] = {"ours": ours, "plain": plain}


def seconds(path: Path, architecture: str) -> dict[str, list[float]]:
    """Wall-clock times of both loaders, in turn."""
    found: dict[str, list[float]] = {name: [] for name in LOADERS}
    for turn in range(ROUNDS + 1):
        for name, load in LOADERS.items():
            start = time.perf_counter()
            kept = load(path, architecture)
            if turn:
                found[name].append(time.perf_counter() - start)
            del kept
            gc.collect()
    return found


def memory(path: Path, architecture: str, name: str) -> dict[str, int]:
    """Bytes that a fresh process grows by, and at its peak."""
    found = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import tell; tell({str(path)!r}, {architecture!r}, {name!r})"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    tree: dict[str, int] = json.loads(found.stdout)
    return tree


def tell(path: str, architecture: str, name: str) -> None:
    """Load once, in this process, and print what `memory` wants to know."""
    torch.set_num_threads(1)
    with torch.device("meta"):  # what torch imports at the first model is not the file's
        timm.create_model("vit_tiny_patch16_224", depth=1)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status()["VmRSS"]
    kept = LOADERS[name](Path(path), architecture)
    after = _status()
    del kept
    sys.stdout.write(json.dumps({"held": after["VmRSS"] - before, "peak": after["VmHWM"] - before}))


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if " kB" in rest
    }


def run() -> str:
    """The table."""
    torch.set_num_threads(1)
    lines = [
        "| file | MB | load, ms | `create_model` + `load_file`, ms | ratio | memory held, MB | at the peak, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for architecture, share, store in ROWS:
            checkpoint = WEIGHTS if "tiny" in architecture else None
            if checkpoint and not checkpoint.is_file():
                continue
            path = Path(folder) / "m.safetensors"
            make(path, architecture, share, store, checkpoint)
            times = {name: statistics.median(each) for name, each in seconds(path, architecture).items()}
            grown = memory(path, architecture, "ours")
            lines.append(
                f"| {architecture}, `--share {share}`, {store} | {path.stat().st_size / 1e6:.1f} "
                f"| {1e3 * times['ours']:.0f} | {1e3 * times['plain']:.0f} | {times['ours'] / times['plain']:.2f} "
                f"| {grown['held'] / 1e6:.1f} | {grown['peak'] / 1e6:.1f} |"
            )
    return "\n".join([*lines, "", f"Medians of {ROUNDS}, alternating, on one thread."])
