"""Which images, which labels, which views?  Folders or the bundle in, loaders out, by timm's data config.

    folder/n01440764/a.jpg   class folders: labelled, by ImageNet synset, --class-map, number, or sorted name
    folder/a.jpg             flat: unlabelled
    folder/{train,val}/…     both of the above, split as ImageNet is

Each training view is drawn from its own seed, so the stream of views is the same for any number of workers.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vitcompress.bundled import Bundle
from vitcompress.classes import class_indices, names_in_order
from vitcompress.errors import DataError, RecipeError
from vitcompress.recipe import DataRecipe

TRAIN_NAMES, VAL_NAMES = ("train", "training"), ("val", "validation", "test")
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 5000
EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MODES = {1: "L", 3: "RGB"}


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
        with Image.open(self.paths[index]) as image:
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


class Batch(NamedTuple):
    """Images as the model takes them; a tuple, so that accelerate can move it to a device.

    Attributes:
        images: `[B, C, H, W]`.
        labels: `[B]` int64; -1 where there is no label.
        bad: images that could not be read, and why; not in `images`.
    """

    images: Tensor
    labels: Tensor
    bad: tuple[str, ...]


class Views(Dataset[tuple[Tensor, int] | str]):
    """Views of the images of a set: `views[index, draw]`, each drawn from a seed of its own.

    Args:
        images: where the images come from.
        config: timm's data config.
        training: random crops and flips, else the centre crop.
        recipe: how random crops and flips are.
        seed: with `draw`, decides the view.
    """

    def __init__(
        self, images: ImageSet, config: Mapping[str, Any], *, training: bool, recipe: DataRecipe, seed: int
    ) -> None:
        self.images, self.seed = images, seed
        channels = config["input_size"][0]
        if channels not in _MODES:
            raise DataError(f"The model takes {channels} channels; images have 1 or 3.")
        self.mode = _MODES[channels]
        self.transform = random_views(config, recipe) if training else create_transform(**config, is_training=False)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        position, draw = key
        index = self.images.indices[position]
        try:
            image = _convert(self.images.reader.open(index), self.mode)
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            return f"{self.images.reader.where(index)}: {error}"
        with seeded(self.seed, draw):
            view: Tensor = self.transform(image)
        return view, self.images.labels[index] if self.images.labels is not None else -1


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to `L` or `RGB`, as a viewer would show it."""
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def random_views(config: Mapping[str, Any], recipe: DataRecipe) -> Any:
    """Timm's training transform.

    Args:
        config: timm's data config.
        recipe: how random crops and flips are.

    Raises:
        RecipeError: --auto-augment is no policy of timm's.
    """
    try:
        transform = create_transform(
            **config, is_training=True, scale=(recipe.crop_min, 1.0), hflip=recipe.hflip, color_jitter=None,
            auto_augment=recipe.auto_augment, re_prob=recipe.erase, re_mode="pixel",
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError, IndexError) as error:  # timm asserts what it can read
        raise RecipeError(
            f"--auto-augment {recipe.auto_augment}: timm has no such policy: {error}.",
            hint="For example rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0.",
        ) from error
    for step in transform.transforms:
        for op in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Keep the upper `bits` of each pixel; of none, black.

    timm's own asks Pillow for no bits at all at full magnitude, which Pillow 13 refuses: of the images that
    rand-m9-mstd0.5 draws, one in some hundreds would end the training.
    """
    posterized: Image.Image = auto_augment.posterize(image, bits) if bits else image.point(lambda value: 0)
    return posterized


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Run a block on random numbers of its own, decided by `numbers`; leave the global generators as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Stream(Sampler[list[tuple[int, int]]]):
    """Batches of `(position, draw)`: shuffled passes over the images, end to end, so every batch is full.

    Args:
        num_images: N.
        batch_size: images per batch.
        seed: decides the order; each pass has its own.
        num_steps: batches; endless where None.
        repeats: draws of an image that follow each other; as many passes then take as many times the steps.

    Source: of repeats, Hoffer et al. 2019, arXiv:1901.09335; the order is that of timm's RepeatAugSampler.
    """

    def __init__(self, num_images: int, batch_size: int, *, seed: int, num_steps: int | None, repeats: int = 1) -> None:
        self.num_images, self.batch_size, self.seed, self.num_steps = num_images, batch_size, seed, num_steps
        self.repeats = repeats

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draws = self._draws()
        for _ in itertools.count() if self.num_steps is None else range(self.num_steps):
            yield list(itertools.islice(draws, self.batch_size))

    def _draws(self) -> Iterator[tuple[int, int]]:
        draw = itertools.count()
        for number in itertools.count():
            for position in np.random.default_rng([self.seed, number]).permutation(self.num_images).tolist():
                for _ in range(self.repeats):
                    yield position, next(draw)


def training_loader(
    images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe, *, seed: int, num_steps: int | None
) -> DataLoader[Any]:
    """Random views in shuffled batches of `recipe.batch_size`: `num_steps` of them, or endless.

    Args:
        images: what to train on.
        config: timm's data config.
        recipe: batch size, workers and augmentation.
        seed: decides order and views.
        num_steps: None for an endless loader.
    """
    views = Views(images, config, training=True, recipe=recipe, seed=seed)
    stream = Stream(len(images), recipe.batch_size, seed=seed, num_steps=num_steps, repeats=recipe.repeats)
    return DataLoader(views, batch_sampler=stream, collate_fn=collate, **_workers(recipe, images))


def evaluation_loader(images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe) -> DataLoader[Any]:
    """Centre crops in order, every image once.

    Args:
        images: what to evaluate on.
        config: timm's data config.
        recipe: batch size and workers.
    """
    views = Views(images, config, training=False, recipe=recipe, seed=0)
    keys = [(position, 0) for position in range(len(images))]
    batches = [keys[i : i + recipe.batch_size] for i in range(0, len(keys), recipe.batch_size)]
    return DataLoader(views, batch_sampler=batches, collate_fn=collate, **_workers(recipe, images))


def _workers(recipe: DataRecipe, images: ImageSet) -> dict[str, Any]:
    spare = max(1, min(8, (os.cpu_count() or 2) - 1))
    number = spare if recipe.num_workers is None else recipe.num_workers
    return {"num_workers": number, "persistent_workers": False, "pin_memory": torch.cuda.is_available()}


def collate(samples: Sequence[tuple[Tensor, int] | str]) -> Batch:
    """Stack views; names of unreadable images are kept apart."""
    good = [sample for sample in samples if not isinstance(sample, str)]
    images = torch.stack([view for view, _ in good]) if good else torch.empty(0)
    bad = tuple(sample for sample in samples if isinstance(sample, str))
    return Batch(images, torch.tensor([label for _, label in good], dtype=torch.int64), bad)


def check_readable(batch: Batch, *, skip: bool) -> int:
    """Count the unreadable images of a batch.

    Args:
        batch: as loaded.
        skip: whether the user asked to go on without them.

    Raises:
        DataError: there are some, and they are not to be skipped.
    """
    if batch.bad and not skip:
        raise DataError(f"Unreadable image: {batch.bad[0]}", hint="--skip-bad-images goes on without such images.")
    return len(batch.bad)
