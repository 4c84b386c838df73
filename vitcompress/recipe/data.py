"""The stage that names images and labels, with their augmentation and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from vitcompress.recipe.values import CONFIG, AnyPath, Workers, option

BUILT_IN = "built-in"


@dataclass(frozen=True, config=CONFIG)
class DataRecipe:
    """Images, labels and augmentation."""

    data: Annotated[str | None, AnyPath] = option(
        None,
        "Training images: a folder, wds:SHARDS, hfds:DIR, torch/NAME:DIR or built-in. "
        f"Default: {BUILT_IN}, if images are needed.",
    )
    val_data: Annotated[str | None, AnyPath] = option(
        None, "Images to evaluate on. Default: the validation split of --data, else a tenth held out of it."
    )
    image_key: str | None = option(None, "Column (hfds) or file extension (wds) of the images. Default: detected.")
    label_key: str | None = option(
        None, "Column (hfds) or file extension (wds) of the labels. Default: label (hfds), cls (wds)."
    )
    class_map: Path | None = option(
        None, "Text file with one class name per line, in the order of the model's classes."
    )
    skip_bad_images: bool = option(False, "Skip and count unreadable images instead of stopping.")
    batch_size: int = option(128, "Images per training step, over all processes.", ge=1)
    num_workers: Annotated[int | Literal["auto"], Workers] = option(
        "auto", "Processes that decode images; auto: one less than the CPU cores, at most 16."
    )
    crop_min: float = option(0.6, "Smallest fraction of the image that a random training crop covers.", gt=0, le=1)
    hflip: float = option(0.5, "Probability of flipping a training image horizontally.", ge=0, le=1)
    auto_augment: str | None = option(None, "timm augmentation policy for training images, like rand-m9-mstd0.5-inc1.")
    erase: float = option(0.0, "Probability of erasing a random rectangle of a training image.", ge=0, le=1)
    repeats: int = option(1, "Number of successive views of each training image (repeated augmentation).", ge=1)
    mixup: float = option(0.0, "Mixup alpha; 0 turns mixup off.", ge=0)
    cutmix: float = option(0.0, "CutMix alpha; 0 turns CutMix off.", ge=0)

    def __post_init__(self) -> None:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"--batch-size {self.batch_size}: must be even, because --mixup and --cutmix mix pairs of images"
            )
