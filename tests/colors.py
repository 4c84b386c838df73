"""Models that really classify colors, and images of one color: right accuracies are known."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.conftest import ARCHITECTURE, model_flags
from tests.factories import tiny


def color(number: int) -> tuple[int, int, int]:
    """Return the color of a class, 0 to 11."""
    red, green, blue = colorsys.hsv_to_rgb(number % 6 / 6, 0.8, 0.9 if number < 6 else 0.35)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(path: Path, number: int, seed: int = 0) -> None:
    """Save an image of the color of a class, with a little noise."""
    noise = np.random.default_rng([seed, number]).normal(0, 4, (40, 40, 3))
    pixels = np.clip(np.array(color(number)) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def folders(root: Path, names: Sequence[str] | Mapping[str, int], each: int = 3, first: int = 0) -> Path:
    """Save class folders; a name's position, or the number it maps to, is its color."""
    numbers = names if isinstance(names, Mapping) else {name: number for number, name in enumerate(names)}
    for name, number in numbers.items():
        for seed in range(first, first + each):
            draw(root / name / f"{seed}.png", number, seed)
    return root


def classifier(num_classes: int, mean: float = 0.5, std: float = 0.5) -> nn.Module:
    """Return a ViT that classifies the colors: its head takes the nearest features of a color."""
    model: Any = tiny(num_classes=num_classes, depth=2)
    pixels = torch.tensor([color(n) for n in range(num_classes)])[:, :, None, None].expand(-1, -1, 32, 32) / 255
    with torch.no_grad():
        for block in model.blocks:  # so that colors stay far apart
            block.attn.proj.weight.mul_(0.1)
            block.mlp.fc2.weight.mul_(0.1)
        features = model.forward_head(model.forward_features((pixels - mean) / std), pre_logits=True)
        center = features.mean(0)
        centroids = features - center
        scale = 40 / torch.pdist(centroids).min() ** 2  # logits of the nearest centroid
        model.head.weight.copy_(2 * scale * centroids)
        model.head.bias.copy_(-scale * centroids.pow(2).sum(1) - model.head.weight @ center)
    classifies: nn.Module = model
    return classifies


def saved(model: nn.Module, path: Path) -> list[str]:
    """Save a classifier; return MODEL and the flags that make it."""
    save_file(model.state_dict(), path)
    flags = model_flags(num_classes=model.num_classes, depth=2)
    return [ARCHITECTURE, *flags, "--checkpoint", str(path)]
