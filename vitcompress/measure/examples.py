"""Collect the images on which student and teacher differ most, as the kind of outputs tells."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitcompress.families.outputs import CLASSES, OutputKind, bernoulli_nats, deviation_of
from vitcompress.measure.results import Accuracy

_MAX_EXAMPLES = 12
_MAX_SIDE = 256  # pixels: a page with all examples stays below a megabyte
_MAX_SMALL_SIDE = 64  # pixels: up to this size, pixels are shown as squares


class Prediction(NamedTuple):
    """What a model says of an image.

    Attributes:
        output: class, label or output that it says it of; None where there is but one.
        value: probability or number, as text.
    """

    output: int | None
    value: str


@dataclass(frozen=True)
class Example:
    """An image on which student and teacher differ.

    Attributes:
        picture: the image as the student sees it, as a data URI.
        is_small: the image has few pixels.
        label: class of the image; -1 without labels.
        teacher: of the class that it predicts, or of the output on which the models differ most.
        student: likewise.
    """

    picture: str
    is_small: bool
    label: int
    teacher: Prediction
    student: Prediction


class Difference(NamedTuple):
    """How student and teacher differ on an image.

    Attributes:
        image: its number in the batch.
        weight: images of greater weight are shown first.
        teacher: prediction of the teacher.
        student: prediction of the student.
    """

    image: int
    weight: float
    teacher: Prediction
    student: Prediction


class Examples:
    """Collects examples during an evaluation.

    Args:
        mean: per channel, from timm's data config.
        std: per channel, from timm's data config.
        kind: kind of the models' outputs.

    Attributes:
        kind: kind of the models' outputs.
        count: images on which the models differ.
        accuracy: result of the evaluation; None until the caller sets it.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], kind: OutputKind = CLASSES) -> None:
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.kind = kind
        self.kept: list[tuple[float, int, Example]] = []  # a heap; the example of least weight is first
        self.count = 0
        self.accuracy: Accuracy | None = None
        self.deviation: Tensor | None = None  # of the first batch: one unit for all images

    def watch(self, images: Tensor, student: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        """Collect examples from a batch.

        Args:
            images: normalized, `[B, C, H, W]`.
            student: outputs `[B, K]`; features may have tokens, `[B, N, C]`.
            teacher: outputs of the same shape; None without a teacher, which gives no examples.
            labels: `[B]`; -1 without labels.
        """
        if teacher is None:
            return
        if self.deviation is None:
            self.deviation = deviation_of(teacher)
        for image, weight, teachers, students in DIFFERENCES[self.kind.name](student, teacher, self.deviation):
            self.count += 1
            if len(self.kept) == _MAX_EXAMPLES and weight <= self.kept[0][0]:
                continue
            picture, is_small = self._picture(images[image].cpu())
            example = Example(picture, is_small, int(labels[image]), teachers, students)
            push = heapq.heappushpop if len(self.kept) == _MAX_EXAMPLES else heapq.heappush
            push(self.kept, (weight, -self.count, example))

    def surest(self) -> list[Example]:
        """Return the examples of greatest weight, the greatest first."""
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


def _different_classes(student: Tensor, teacher: Tensor, deviation: Tensor) -> Iterator[Difference]:
    """Yield the images that get another class; those of which both models are surest weigh most."""
    student_sure, student_class = student.softmax(1).max(1)
    teacher_sure, teacher_class = teacher.softmax(1).max(1)
    for i in (student_class != teacher_class).nonzero().flatten().tolist():
        yield Difference(
            i, min(float(student_sure[i]), float(teacher_sure[i])),
            Prediction(int(teacher_class[i]), _percent(teacher_sure[i])),
            Prediction(int(student_class[i]), _percent(student_sure[i])),
        )  # fmt: skip


def _different_labels(student: Tensor, teacher: Tensor, deviation: Tensor) -> Iterator[Difference]:
    """Yield the images that get other labels at 0.5; of these, the label of most nats counts."""
    nats = bernoulli_nats(student, teacher).where((student > 0) != (teacher > 0), 0.0)
    for i in ((student > 0) != (teacher > 0)).any(1).nonzero().flatten().tolist():
        label = int(nats[i].argmax())
        yield Difference(
            i, float(nats[i, label]),
            Prediction(label, _percent(teacher[i, label].sigmoid())),
            Prediction(label, _percent(student[i, label].sigmoid())),
        )  # fmt: skip


def _different_numbers(student: Tensor, teacher: Tensor, deviation: Tensor) -> Iterator[Difference]:
    """Yield the images whose numbers differ, by the largest error in the teacher's deviation."""
    errors = (student - teacher).abs() / deviation
    for i in errors.any(1).nonzero().flatten().tolist():
        output = int(errors[i].argmax())
        number = output if errors.shape[1] > 1 else None
        values = (Prediction(number, f"{float(outputs[i, output]):.4g}") for outputs in (teacher, student))
        yield Difference(i, float(errors[i, output]), *values)


def _different_features(student: Tensor, teacher: Tensor, deviation: Tensor) -> Iterator[Difference]:
    """Yield all images, by the cosine similarity of their features, a mean over tokens."""
    cosines = F.cosine_similarity(student, teacher, dim=-1).flatten(1 if student.ndim > 2 else 0)
    for i, cosine in enumerate((cosines.mean(1) if cosines.ndim > 1 else cosines).tolist()):
        yield Difference(i, -cosine, Prediction(None, "features"), Prediction(None, f"cosine similarity {cosine:.4f}"))


DIFFERENCES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Iterator[Difference]]] = {
    "classes": _different_classes,
    "multi_label": _different_labels,
    "regression": _different_numbers,
    "features": _different_features,
}
"""What counts as a difference, by the kind of the models' outputs."""


def _percent(probability: Tensor) -> str:
    return f"{100 * float(probability):.0f} %"
