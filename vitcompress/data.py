"""Which images, which labels, which views?  Folders or the bundle in, loaders out, by timm's data config.

    folder/n01440764/a.jpg   class folders: labelled, by ImageNet synset, --class-map, number, or sorted name
    folder/a.jpg             flat: unlabelled
    folder/{train,val}/…     both of the above, split as ImageNet is

Each training view is drawn from its own seed, so the stream of views is the same for any number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vitcompress.bundled import Bundle
from vitcompress.classes import class_indices, names_in_order
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe

TRAIN_NAMES, VAL_NAMES = ("train", "training"), ("val", "validation", "test")
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 5000
# whatever a file is called, it is decoded in this process: Pillow would run Ghostscript for PostScript
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class Reader(Protocol):
    """A sequence of images that can be opened by number."""

    def __len__(self) -> int: ...
    def open(self, index: int) -> Image.Image:
        """Decode image `index`."""

    def where(self, index: int) -> str:
        """What to call image `index` in a message."""


@dataclass(frozen=True)
class FileReader:
    """Images in files."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """Decode image `index`."""
        with Image.open(self.paths[index], formats=FORMATS) as image:
            image.load()
            return image

    def where(self, index: int) -> str:
        """Its path."""
        return str(self.paths[index])


@dataclass(frozen=True)
class ArrayReader:
    """Images in memory: `[N, H, W]` uint8, one channel."""

    images: np.ndarray[Any, Any]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        """Wrap image `index`."""
        return Image.fromarray(self.images[index])

    def where(self, index: int) -> str:
        """The array's name and the image's number."""
        return f"{self.name}[{index}]"


@dataclass(frozen=True)
class ImageSet:
    """Images and, where there are any, their labels.

    Attributes:
        name: what to call the set in reports.
        reader: opens the images.
        labels: indices into the model's classes, one per image; None where there are none.
        indices: the images of `reader` that belong to the set.
        classes: the name of each of the model's classes, in their order; empty where the images do not tell them all.
    """

    name: str
    reader: Reader
    labels: tuple[int, ...] | None
    indices: tuple[int, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, positions: Sequence[int], name: str) -> ImageSet:
        """The images at `positions`, under another name."""
        return replace(self, name=name, indices=tuple(self.indices[p] for p in positions))


def open_sets(
    recipe: DataRecipe, *, bundle: Bundle | None, num_classes: int | None, seed: int, classes: Sequence[str] = ()
) -> tuple[ImageSet | None, ImageSet | None]:
    """Find the images to train and to evaluate on; opens no image.

    Args:
        recipe: folders and the class map.
        bundle: the built-in images to use where no folder is given.
        num_classes: K of the model; 0 where it has none and labels mean nothing; None for as many as the training
            images have.
        seed: which images are held out, where they must be.
        classes: names of the model's classes, in order; empty where they are not known.

    Returns:
        Training and validation images; None where there are none.

    Raises:
        DataError: a folder is missing or empty, or its class folders match no mapping.
    """
    if recipe.data is None and recipe.val_data is None:
        return (_bundled(bundle, "train"), _bundled(bundle, "val")) if bundle else (None, None)
    train = _bundled(bundle, "train") if bundle else None
    val_dir, flag = recipe.val_data, "--val-data"
    if recipe.data is not None:
        train_dir, beside = _splits(recipe.data)
        train = open_folder(train_dir, "--data", num_classes, recipe.class_map, classes)
        if val_dir is None:
            val_dir, flag = beside, "--data"
    if num_classes is None and train is not None and train.classes:  # so that both sets count the same classes
        num_classes, classes = len(train.classes), train.classes
    val = open_folder(val_dir, flag, num_classes, recipe.class_map, classes) if val_dir else None
    if val is None and train is not None:
        train, val = hold_out(train, seed=seed)
    return train, val


def hold_out(images: ImageSet, *, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split a tenth off, at most 5,000 images, at random by `seed`; the rest comes first."""
    count = max(1, min(HELD_OUT_MOST, round(len(images) * HELD_OUT_SHARE)))
    if count >= len(images):
        raise DataError(f"{images.name} has {len(images)} image(s): too few to hold any out.", hint="Give --val-data.")
    order = np.random.default_rng(seed).permutation(len(images))
    held = images.subset(sorted(order[:count]), f"{images.name} ({count} held out of training)")
    return images.subset(sorted(order[count:]), images.name), held


def _bundled(bundle: Bundle, split: str) -> ImageSet:
    with np.load(bundle.images, allow_pickle=False) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    name = f"Fashion-MNIST, {len(images):,} {'training' if split == 'train' else 'test'} images (built in)"
    names = tuple(bundle.pretrained_cfg["label_names"])
    return ImageSet(name, ArrayReader(images, name), tuple(int(y) for y in labels), tuple(range(len(images))), names)


def _splits(root: Path) -> tuple[Path, Path | None]:
    """The training folder of `root` and, where it is laid out as ImageNet is, its validation folder."""
    train = next((root / name for name in TRAIN_NAMES if (root / name).is_dir()), None)
    val = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    return (train, val) if train and val else (root, None)


def validation_folder(root: Path) -> Path:
    """`root`, or the validation folder in it where it is laid out as ImageNet is."""
    return _splits(root)[1] or root


def open_folder(
    root: Path, flag: str, num_classes: int | None, class_map: Path | None, classes: Sequence[str] = ()
) -> ImageSet:
    """The images of a folder, labelled where they lie in class folders.

    Args:
        root: class folders, or a flat folder of unlabelled images.
        flag: the option that named it, for messages.
        num_classes: K of the model; 0 where it has none: labels are left out then. None for as many as there are.
        class_map: a text file with a folder's name per line, in the order of the model's classes.
        classes: names of the model's classes, in order; empty where they are not known.

    Raises:
        DataError: missing, not readable, empty, or of classes that match no mapping.
    """
    if not root.is_dir():
        raise DataError(f"{flag} {root} {'is not a folder' if root.exists() else 'does not exist'}.")
    paths = tuple(sorted(path for path in _walk(root) if path.suffix.lower() in EXTENSIONS))
    if not paths:
        raise DataError(f"{flag} {root} has no images in it.", hint=f"Looked for {', '.join(sorted(EXTENSIONS))}.")
    folders = [path.relative_to(root).parts[0] if path.parent != root else "" for path in paths]
    reader, everything = FileReader(paths), tuple(range(len(paths)))
    if "" in folders:
        if len(set(folders)) > 1:
            raise DataError(
                f"{flag} {root} holds both images and folders of images.", hint="Class folders, or a flat folder."
            )
        return ImageSet(str(root), reader, None, everything)
    if num_classes == 0:
        return ImageSet(str(root), reader, None, everything)
    index_of = class_indices(sorted(set(folders)), f"{flag} {root}", num_classes, class_map, classes)
    labels = tuple(index_of[folder] for folder in folders)
    return ImageSet(str(root), reader, labels, everything, names_in_order(index_of, num_classes))


def _walk(root: Path) -> Iterator[Path]:
    """Every file below `root`, through links too, each folder once."""
    seen = set()
    for folder, below, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (Path(folder) / file for file in files)
