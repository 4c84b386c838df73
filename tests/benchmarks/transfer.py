"""Does a compressed model learn other classes better than the same architecture from scratch?

The built-in model, its blocks all sharing one set of matrices, learns Fashion-MNIST's ten classes
regrouped into five: by `vitcompress finetune`, and by the same command on the same architecture and
head from random weights. Equal steps, images, views and learning rates; each side has the best of
the learning rates tried.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import vitcompress
from vitcompress.artifact.read import read_manifest
from vitcompress.artifact.write import write
from vitcompress.bundled import FASHION_VIT
from vitcompress.pretrained.build import build_model
from vitcompress.pretrained.resolve import Source
from vitcompress.recipe.compose import build
from vitcompress.surgery import apply_plan

GROUPS = {
    "tops": ("T-shirt/top", "Pullover", "Coat", "Shirt"),
    "trousers": ("Trouser",),
    "dresses": ("Dress",),
    "shoes": ("Sandal", "Sneaker", "Ankle boot"),
    "bags": ("Bag",),
}
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
STEPS = 60


def run() -> str:
    """The table of both, over seeds."""
    lines = ["| start | top-1 by seed | mean | learning rate |", "|---|---|---:|---:|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "data", per_class=200)
        compress(folder / "mini.safetensors", steps=200)
        randomize(folder / "mini.safetensors", folder / "random.safetensors")
        for start, file in (("compressed", "mini.safetensors"), ("random weights", "random.safetensors")):
            results = {
                lr: [finetune(folder / file, folder / "data", steps=STEPS, lr=lr, seed=seed) for seed in SEEDS]
                for lr in LEARNING_RATES
            }
            lr, best = max(results.items(), key=lambda item: sum(item[1]))
            shown = ", ".join(f"{top1:.1f} %" for top1 in best)
            lines.append(f"| {start} | {shown} | {sum(best) / len(best):.1f} % | {lr:g} |")
    return "\n".join([*lines, "", f"{STEPS} steps of 64 images; five classes, evaluated on images not trained on."])


def write_images(root: Path, *, per_class: int) -> None:
    """Class folders of the built-in images, regrouped.

    Args:
        root: gets train/ and val/.
        per_class: images of each of the ten classes to train on; a half as many to evaluate on.
    """
    names = FASHION_VIT.pretrained_cfg["label_names"]
    group_of = {name: group for group, members in GROUPS.items() for name in members}
    with np.load(FASHION_VIT.images, allow_pickle=False) as arrays:
        for split, count in (("train", per_class), ("val", per_class // 2)):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            for label, name in enumerate(names):
                folder = root / split / group_of[name]
                folder.mkdir(parents=True, exist_ok=True)
                for number in np.flatnonzero(labels == label)[:count]:
                    Image.fromarray(images[number]).save(folder / f"{label}-{number}.png")


def compress(out: Path, *, steps: int) -> None:
    """The built-in model with one set of matrices for all of its blocks."""
    vitcompress.compress(build({"model": FASHION_VIT.name, "share": 12, "steps": steps, "device": "cpu"}), out)


def randomize(path: Path, out: Path) -> None:
    """Write the artifact of `path` with the weights that timm starts that architecture from."""
    manifest = read_manifest(path)
    torch.manual_seed(0)
    model: nn.Module = build_model(Source(**manifest.source))
    apply_plan(model, manifest.plan)
    write(out, model.eval(), manifest, torch.randn(2, *manifest.data_config["input_size"]))


def finetune(path: Path, data: Path, *, steps: int, lr: float, seed: int = 0) -> float:
    """Top-1 of an artifact fine-tuned on class folders, in percent.

    Args:
        path: the artifact.
        data: train/ and val/ with class folders.
        steps: of 64 images.
        lr: peak learning rate.
        seed: of head, order and views.
    """
    recipe = build({
        "model": path.name, "data": data, "steps": steps, "lr": lr, "seed": seed, "batch_size": 64, "device": "cpu",
    })  # fmt: skip
    report = vitcompress.finetune(path, recipe, path.with_name(f"tuned-{path.name}"))
    assert report.accuracy is not None
    assert report.accuracy.student_top1 is not None
    return report.accuracy.student_top1
