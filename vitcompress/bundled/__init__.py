"""Data that comes with the package, for use offline: a small model, its images, and photographs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Bundle:
    """A built-in model and its images.

    Attributes:
        name: name that the user types.
        architecture: name of the timm model.
        model_args: arguments of timm's constructor.
        pretrained_cfg: timm's description of the weights, with the data config.
        checkpoint: path of the weights.
        images: path of an .npz file of `{train,val}_{images,labels}`.
        recipe: defaults of the recipe for this model, by stage; they suit a small model whose
            blocks all share.
    """

    name: str
    architecture: str
    model_args: Mapping[str, Any]
    pretrained_cfg: Mapping[str, Any]
    checkpoint: Path
    images: Path
    recipe: Mapping[str, Mapping[str, Any]]


FASHION_VIT = Bundle(
    name="fashion_vit",
    architecture="vit_tiny_patch16_224",  # only names the constructor; all sizes are set below
    model_args={
        "img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 12, "num_heads": 3,
    },
    pretrained_cfg={
        "input_size": (1, 28, 28), "num_classes": 10, "mean": (0.2860,), "std": (0.3530,), "crop_pct": 1.0,
        "interpolation": "bicubic",
        "label_names": (
            "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
        ),
    },
    checkpoint=HERE / "fashion_vit.safetensors",
    images=HERE / "fashion_mnist.npz",
    recipe={
        "data": {"batch_size": 64, "crop_min": 0.85},
        "start": {"start": "first"},  # with fade, training begins as the source anyway
        "distill": {"steps": 700, "optimizer": "muon", "fade": 0.6},
    },
)  # fmt: skip


@dataclass(frozen=True)
class Photograph:
    """A photograph whose crops stand in for images; README.md in this folder names its origin.

    Attributes:
        file: name of the file.
        author: name of the photographer.
        licence: its license.
        held_out: whether it is for evaluation only.
    """

    file: str
    author: str
    licence: str
    held_out: bool = False

    @property
    def path(self) -> Path:
        """Path of the file."""
        return HERE / "photographs" / self.file


PHOTOGRAPHS = (
    Photograph("brushes.jpg", "Trevor “Freespace”", "CC-BY-4.0"),
    Photograph("dandelions.jpg", "Clemens Engelhardt", "CC0-1.0"),
    Photograph("dogs.jpg", "Aitzol Berasategi", "CC-BY-4.0"),
    Photograph("fig.jpg", "Trevor “Freespace”", "CC-BY-4.0"),
    Photograph("mountains.jpg", "Aitzol Berasategi", "CC-BY-4.0"),
    Photograph("room.jpg", "Jakub Mede", "CC-BY-4.0"),
    Photograph("stream.jpg", "Aitzol Berasategi", "CC-BY-4.0"),
    Photograph("meadow.jpg", "Aitzol Berasategi", "CC-BY-4.0", held_out=True),
)
