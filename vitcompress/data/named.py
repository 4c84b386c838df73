"""Which images are in a data set that torchvision knows by name?  As it lies on the disk; nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vitcompress.data.sets import RawImageSet
from vitcompress.errors import DataError, first_line, nearest

_FLAG = ({"train": True}, {"train": False})
_TEST = ({"split": "train"}, {"split": "test"})

# timm's names and torchvision's: class, and what chooses training and validation images
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
    """Images of a data set of torchvision.

    Attributes:
        images: the data set.
        name: what to call it.
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
        """The set's name and the image's number."""
        return f"{self.name}[{index}]"


def default_root() -> Path:
    """Where sets lie for which no folder is named: beside what torch.hub keeps."""
    return Path(torch.hub.get_dir()).parent / "datasets"


def open_named(place: str, split: str, where: str) -> RawImageSet:
    """The images of a split.

    Args:
        place: `NAME`, or `NAME:FOLDER` where torchvision's `root` is FOLDER.
        split: "train" or "val", for which sets without one have their test images.
        where: what to call it in messages.

    Raises:
        DataError: no such set, or it is not there.
    """
    import torchvision

    name, _, folder = place.partition(":")
    root = Path(folder) if folder else default_root()
    if name.lower() not in NAMES:
        raise DataError(
            f"{where}: torchvision has no set {name} of images and classes{nearest(name.lower(), NAMES)}.",
            hint=f"There are {', '.join(NAMES)}.",
        )
    kind, splits = NAMES[name.lower()]
    arguments = splits[split == "val"]
    try:
        images = getattr(torchvision.datasets, kind)(str(root), **arguments)
    except (RuntimeError, OSError, ImportError) as error:  # ImportError: scipy, which StanfordCars reads with
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
    return RawImageSet(title, NamedReader(images, title), targets, _classes(images, targets))


def _targets(images: Any) -> tuple[int, ...]:
    """The label of each image; no image is opened."""
    if hasattr(images, "_samples"):  # StanfordCars keeps paths and labels together
        return tuple(int(label) for _, label in images._samples)
    found = images.targets if hasattr(images, "targets") else images._labels
    return tuple(int(label) for label in found)


def _classes(images: Any, targets: tuple[int, ...]) -> tuple[str, ...]:
    """Names in torchvision's order; ImageNet's are synsets, as its folders are."""
    names = getattr(images, "wnids", None) or getattr(images, "classes", None)
    return tuple(map(str, names or range(max(targets) + 1)))
