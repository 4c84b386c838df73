"""On which images do student and teacher differ most?  Those on which both are sure of another class."""

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

_MOST = 12
_LARGEST = 256  # pixels of a side: a page of them stays below a megabyte
_SMALL = 64  # up to which pixels are shown as squares


@dataclass(frozen=True)
class Example:
    """An image on which two models differ.

    Attributes:
        picture: a data URI, as the student sees it.
        small: it has few pixels.
        label: its class; -1 where it has none.
        teacher: the class that the teacher says.
        teacher_percent: of probability that it gives to it.
        student: the class that the student says.
        student_percent: of probability that it gives to it.
    """

    picture: str
    small: bool
    label: int
    teacher: int
    teacher_percent: float
    student: int
    student_percent: float


class Examples:
    """Collects them during an evaluation.

    Args:
        mean: of timm's data config, per channel.
        std: the same.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.kept: list[tuple[float, int, Example]] = []
        self.count = 0
        self.accuracy: Accuracy | None = None

    def watch(self, images: Tensor, student: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        """Look at a batch: images `[B, C, H, W]`, logits `[B, K]`, labels `[B]`."""
        if teacher is None or student.ndim != 2:
            return
        sure, said = student.softmax(1).max(1)
        teacher_sure, teacher_said = teacher.softmax(1).max(1)
        for i in (said != teacher_said).nonzero().flatten().tolist():
            self.count += 1
            weight = min(float(sure[i]), float(teacher_sure[i]))
            if len(self.kept) == _MOST and weight <= self.kept[0][0]:
                continue
            picture, small = self._picture(images[i].cpu())
            example = Example(
                picture, small, int(labels[i]), int(teacher_said[i]), 100 * float(teacher_sure[i]), int(said[i]),
                100 * float(sure[i]),
            )  # fmt: skip
            push = heapq.heappushpop if len(self.kept) == _MOST else heapq.heappush
            push(self.kept, (weight, -self.count, example))

    def found(self) -> list[Example]:
        """Those of which both are surest, the surest first."""
        return [example for _, _, example in sorted(self.kept, reverse=True)]

    def _picture(self, image: Tensor) -> tuple[str, bool]:
        """An image `[C, H, W]` as the student sees it: a data URI, and whether it has few pixels."""
        pixels = ((image * self.std + self.mean).clamp(0, 1) * 255).round().to(torch.uint8)
        array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        picture = Image.fromarray(array.numpy())
        small = max(picture.size) <= _SMALL
        picture.thumbnail((_LARGEST, _LARGEST))
        data = io.BytesIO()
        # photographs take a tenth as JPEG; of few pixels each is kept as it is
        picture.save(data, format="PNG" if small else "JPEG")
        kind = "png" if small else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}", small
