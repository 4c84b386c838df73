"""Collect the images that student and teacher classify differently with the most confidence."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vitcompress.measure.results import Accuracy

_MAX_EXAMPLES = 12
_MAX_SIDE = 256  # pixels: a page with all examples stays below a megabyte
_MAX_SMALL_SIDE = 64  # pixels: up to this size, pixels are shown as squares


@dataclass(frozen=True)
class Example:
    """An image that student and teacher classify differently.

    Attributes:
        picture: the image as the student sees it, as a data URI.
        is_small: the image has few pixels.
        label: class of the image; -1 without labels.
        teacher: class predicted by the teacher.
        teacher_percent: probability of that class, in percent.
        student: class predicted by the student.
        student_percent: probability of that class, in percent.
    """

    picture: str
    is_small: bool
    label: int
    teacher: int
    teacher_percent: float
    student: int
    student_percent: float


class Examples:
    """Collects examples during an evaluation.

    Args:
        mean: per channel, from timm's data config.
        std: per channel, from timm's data config.

    Attributes:
        count: images that the models classify differently.
        accuracy: result of the evaluation; None until the caller sets it.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.kept: list[tuple[float, int, Example]] = []  # a heap; the least sure example is first
        self.count = 0
        self.accuracy: Accuracy | None = None

    def watch(self, images: Tensor, student: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        """Collect examples from a batch.

        Args:
            images: normalized, `[B, C, H, W]`.
            student: logits `[B, K]`; features are ignored.
            teacher: logits `[B, K]`; None without a teacher, which gives no examples.
            labels: `[B]`; -1 without labels.
        """
        if teacher is None or student.ndim != 2:
            return
        student_sure, student_class = student.softmax(1).max(1)
        teacher_sure, teacher_class = teacher.softmax(1).max(1)
        for i in (student_class != teacher_class).nonzero().flatten().tolist():
            self.count += 1
            weight = min(float(student_sure[i]), float(teacher_sure[i]))
            if len(self.kept) == _MAX_EXAMPLES and weight <= self.kept[0][0]:
                continue
            picture, is_small = self._picture(images[i].cpu())
            example = Example(
                picture=picture,
                is_small=is_small,
                label=int(labels[i]),
                teacher=int(teacher_class[i]),
                teacher_percent=100 * float(teacher_sure[i]),
                student=int(student_class[i]),
                student_percent=100 * float(student_sure[i]),
            )
            push = heapq.heappushpop if len(self.kept) == _MAX_EXAMPLES else heapq.heappush
            push(self.kept, (weight, -self.count, example))

    def surest(self) -> list[Example]:
        """Return the examples in which both models are surest, the surest first."""
        return [example for _, _, example in sorted(self.kept, reverse=True)]

    def _picture(self, image: Tensor) -> tuple[str, bool]:
        """Return an image `[C, H, W]` as a data URI, and whether it is small."""
        pixels = ((image * self.std + self.mean).clamp(0, 1) * 255).round().to(torch.uint8)
        array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        picture = Image.fromarray(array.numpy())
        is_small = max(picture.size) <= _MAX_SMALL_SIDE
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
        data = io.BytesIO()
        kind = "png" if is_small else "jpeg"  # photographs are ten times smaller as JPEG
        picture.save(data, format=kind)
        return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}", is_small
