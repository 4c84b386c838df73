"""Find the images of a data set that torchvision knows by name; it must be on the disk already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vitcompress.data.classes import ImageClasses
from vitcompress.data.sets import RawImageSet
from vitcompress.errors import DataError, first_line, nearest

_FLAG = ({"train": True}, {"train": False})
_TEST = ({"split": "train"}, {"split": "test"})

# timm's name -> torchvision's class, and its arguments for training and validation images
NAMES: Mapping[str, tuple[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", _FLAG),
    "cifar100": ("CIFAR100", _FLAG),
    "mnist": ("MNIST", _FLAG),
    "fashion_mnist": ("FashionMNIST", _FLAG),
    "kmnist": ("KMNIST", _FLAG),
    "imagenet": ("ImageNet", ({"split": "train"}, {"split": "val"})),
    "flowers102": ("Flowers102", _TEST),
    "oxford_iiit_pet": ("OxfordIIITPet", ({"split": "trainval"}, {"split": "test"})),
    "food101": ("Food101", _TEST),
    "stanford_cars": ("StanfordCars", _TEST),
    "dtd": ("DTD", _TEST),
}


@dataclass(frozen=True)
class NamedReader:
    """Images of a torchvision data set.

    Attributes:
        images: the data set.
        name: name of the data set in messages.
    """

    images: Any
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Decode image `index`."""
        image: Image.Image = self.images[index][0]
        return image

    def where(self, index: int) -> str:
        """Return the name of the data set and the number of the image."""
        return f"{self.name}[{index}]"


def default_root() -> Path:
    """Return the default folder of data sets, beside the folder of torch.hub."""
    return Path(torch.hub.get_dir()).parent / "datasets"


def open_named(place: str, split: str, where: str) -> RawImageSet:
    """Find the images of a split.

    Args:
        place: `NAME`, or `NAME:FOLDER` with torchvision's `root`.
        split: "train" or "val"; data sets without a validation split use their test images.
        where: name of the data set in messages.

    Raises:
        DataError: the name is unknown, or the data set is not on the disk.
    """
    import torchvision

    name, _, folder = place.partition(":")
    root = Path(folder) if folder else default_root()
    if name.lower() not in NAMES:
        raise DataError(
            f"{where}: torchvision has no data set {name} with images and classes{nearest(name.lower(), NAMES)}.",
            hint=f"Known data sets: {', '.join(NAMES)}.",
        )
    kind, splits = NAMES[name.lower()]
    arguments = splits[split == "val"]
    try:
        images = getattr(torchvision.datasets, kind)(str(root), **arguments)
    except (RuntimeError, OSError, ImportError) as error:  # ImportError: StanfordCars needs scipy
        chosen = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise DataError(
            f"{where}: not in {root}: {first_line(error)}",
            hint=f'Name its folder, torch/{name}:FOLDER, or fetch it once: python -c "from torchvision.datasets import '
            f'{kind}; {kind}({str(root)!r}, {chosen}, download=True)"'
            if kind not in ("ImageNet", "StanfordCars")
            else f"Name its folder: torch/{name}:FOLDER.",
        ) from error
    title = f"{where} ({'training' if split == 'train' else 'validation or test'} images)"
    targets = _targets(images)
    names = _classes(images, targets)
    classes = ImageClasses(names, where, "labels", tuple(range(len(names))), named=hasattr(images, "classes"))
    return RawImageSet(title, NamedReader(images, title), targets, classes)


def _targets(images: Any) -> tuple[int, ...]:
    """Return the label of each image without opening one."""
    if hasattr(images, "_samples"):  # StanfordCars keeps paths and labels together
        return tuple(int(label) for _, label in images._samples)
    labels = images.targets if hasattr(images, "targets") else images._labels
    return tuple(int(label) for label in labels)


def _classes(images: Any, targets: tuple[int, ...]) -> tuple[str, ...]:
    """Return the class names in torchvision's order; for ImageNet, the synsets of its folders."""
    names = getattr(images, "wnids", None) or getattr(images, "classes", None)
    return tuple(map(str, names or range(max(targets) + 1)))
