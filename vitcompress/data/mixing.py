"""How are the images of a batch mixed, and their labels with them?  timm's mixup and cutmix, by seed and step."""

from __future__ import annotations

from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from vitcompress.data.augmentation import seeded

_STREAM = 1  # sets these random numbers apart from those of the views


class Mixing:
    """Mix a batch, the same way for the same seed and number.

    Batches are mixed where they are used, after loading, so that teacher and student get the same mixed views, and so
    that the number of workers changes nothing.

    Args:
        mixup: α of mixup; 0 is none.
        cutmix: α of cutmix; 0 is none. With both, each batch has one or the other.
        num_classes: K of the targets; None where no targets are wanted.
        smoothing: share of each label that is spread over all classes.
        seed: with the number of the batch, decides how it is mixed.

    Source: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; in timm's form, as DeiT trains.
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
            images: `[B, C, H, W]`; images are mixed in pairs, so of an odd number the last is left out.
            labels: `[B]`.
            number: of the batch.

        Returns:
            Images, and targets `[B, K]` or None.
        """
        if self.num_classes is None:
            labels = labels.clamp(min=0, max=0)  # timm wants some
        if self.mix is not None and len(images) > 1:
            even = len(images) // 2 * 2
            with seeded(self.seed, _STREAM, number):
                images, targets = self.mix(images[:even], labels[:even])
        else:
            targets = mixup_target(labels, self.num_classes or 1, smoothing=self.smoothing)
        return images, targets if self.num_classes is not None else None
