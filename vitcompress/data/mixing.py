"""Mixup and CutMix of a batch and its labels, by timm; decided by seed and number of the batch."""

from __future__ import annotations

from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from vitcompress.data.augmentation import seeded

_STREAM = 1  # separates these random numbers from those of the views


class Mixing:
    """Mixes batches, the same way for the same seed and number of the batch.

    Batches are mixed after loading, so that teacher and student get the same mixed views, and so
    that the number of workers changes nothing.

    Args:
        mixup: alpha of mixup; 0 turns it off.
        cutmix: alpha of CutMix; 0 turns it off. With both, each batch gets one of them.
        num_classes: number K of classes of the targets; None for no targets.
        smoothing: label smoothing, 0-1.
        seed: with the number of the batch, decides how it is mixed.

    Source: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; timm's version,
        as in DeiT's training.
    """

    def __init__(
        self, *, mixup: float = 0.0, cutmix: float = 0.0, num_classes: int | None = None, smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.num_classes, self.smoothing, self.seed = num_classes, smoothing, seed
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes or 1) if mixup or cutmix else None
        )

    def __call__(self, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
        """Mix a batch, its images in place.

        Args:
            images: `[B, C, H, W]`; they are mixed in pairs, so the last of an odd number is
                dropped.
            labels: `[B]`.
            number: number of the batch.

        Returns:
            Images, and targets `[B, K]`, or None without `num_classes`.
        """
        if self.num_classes is None:
            labels = labels.clamp(min=0, max=0)  # timm needs labels
        if self.mix is not None and len(images) > 1:
            even = len(images) // 2 * 2
            with seeded(self.seed, _STREAM, number):
                images, targets = self.mix(images[:even], labels[:even])
        else:
            targets = mixup_target(labels, self.num_classes or 1, smoothing=self.smoothing)
        return images, targets if self.num_classes is not None else None
