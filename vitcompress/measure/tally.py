"""Sum up the outputs of student and teacher over images, in parts that can be added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol, Self

import torch.nn.functional as F
from torch import Tensor

from vitcompress.families.outputs import CLASSES, FEATURES
from vitcompress.measure.chance import SIGNIFICANCE, at_least, top1_of_chance
from vitcompress.measure.multi_label import MultiLabelTally
from vitcompress.measure.regression import RegressionTally
from vitcompress.measure.results import MAX_CLASSES, MAX_CONFUSIONS, Accuracy, ClassHits, Confusion, unlabeled


class Tally(Protocol):
    """Sums over images.

    Attributes:
        count: images that were added.
        skipped: images that could not be read.
    """

    count: int
    skipped: int

    def add(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        """Add a batch, in place: outputs of both models and labels `[B]`, -1 without labels."""

    def __add__(self, other: Self) -> Self:
        """Return the sums over the images of both."""

    def result(self, name: str) -> Accuracy:
        """Return the accuracy on the images, which are called `name`."""


class LogitTally:
    """Sums over images, of models with classes."""

    def __init__(self) -> None:
        self.count = self.skipped = self.num_classes = 0
        self.kl = 0.0
        # images by what is right or the same: teacher1, student5, agree, only_teacher, …; a missing
        # key was not measured
        self.hits: Counter[str] = Counter()
        # how many images of a label get a prediction, by (label, prediction)
        self.predictions: dict[str, Counter[tuple[int, int]]] = {"student": Counter(), "teacher": Counter()}

    def __add__(self, other: LogitTally) -> LogitTally:
        """Return the sums over the images of both."""
        total = LogitTally()
        for tally in (self, other):
            total.count += tally.count
            total.skipped += tally.skipped
            total.kl += tally.kl
            total.num_classes = max(total.num_classes, tally.num_classes)
            total.hits.update(tally.hits)  # not +, which leaves out zeros
            for name, counts in tally.predictions.items():
                total.predictions[name].update(counts)
        return total

    def add(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        """Add a batch, in place.

        Args:
            student: logits `[B, K]`.
            teacher: logits `[B, K]`; None without a teacher.
            labels: `[B]`; -1 without labels.
        """
        self.count += len(labels)
        self.num_classes = student.shape[1]
        correct = {}
        if (labels >= 0).all():
            for name, logits in (("student", student), ("teacher", teacher)):
                if logits is not None:
                    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                    correct[name] = top[:, 0]
                    self.predictions[name].update(zip(labels.tolist(), logits.argmax(1).tolist(), strict=True))
                    self.hits[f"{name}1"] += int(top[:, 0].sum())
                    self.hits[f"{name}5"] += int(top.sum())
        if teacher is not None:
            self.hits["agree"] += int((student.argmax(1) == teacher.argmax(1)).sum())
            log_p, log_q = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
            self.kl += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
        if len(correct) == 2:
            self.hits["only_teacher"] += int((correct["teacher"] & ~correct["student"]).sum())
            self.hits["only_student"] += int((correct["student"] & ~correct["teacher"]).sum())

    def result(self, name: str) -> Accuracy:
        """Return the accuracy on the images, which are called `name`."""

        def percent(key: str) -> float | None:
            return round(100 * self.hits[key] / self.count, 4) if key in self.hits else None

        drop = interval = None
        if "only_teacher" in self.hits:
            only_teacher, only_student = self.hits["only_teacher"], self.hits["only_student"]
            drop = round(100 * (only_teacher - only_student) / self.count, 4)
            interval = paired_interval(only_teacher, only_student, self.count)
        chance, above = self._chance()
        return Accuracy(
            data=name,
            num_images=self.count,
            num_skipped=self.skipped,
            teacher_top1=percent("teacher1"),
            student_top1=percent("student1"),
            teacher_top5=percent("teacher5"),
            student_top5=percent("student5"),
            top1_drop=drop,
            top1_drop_ci95=interval,
            agreement=percent("agree"),
            kl=round(self.kl / self.count, 6) if "agree" in self.hits else None,
            classes=self._classes(),
            confusions=self._confusions(),
            chance_top1=chance,
            above_chance=above,
            outputs=CLASSES.name,
        )

    def _chance(self) -> tuple[float | None, bool | None]:
        """Return the top-1 of chance in percent, and whether the teacher (or student) beats it."""
        key = "teacher1" if "teacher1" in self.hits else "student1"
        if key not in self.hits:
            return None, None
        labels = (label for (label, _), count in self.predictions["student"].items() for _ in range(count))
        chance = top1_of_chance(labels, self.num_classes)
        is_above = self.hits[key] == self.count or at_least(self.hits[key], self.count, chance) < SIGNIFICANCE
        return round(100 * chance, 4), is_above  # a perfect result is no chance, however few classes there are

    def _classes(self) -> tuple[ClassHits, ...]:
        """Return the classes that changed most (without a teacher: most mistakes), worst first."""
        teacher, student = self.predictions["teacher"], self.predictions["student"]
        num_images: Counter[int] = Counter()
        for (label, _), count in student.items():
            num_images[label] += count
        rows = [
            ClassHits(label, count, teacher[label, label] if teacher else None, student[label, label])
            for label, count in num_images.items()
        ]
        changed = sorted(rows, key=lambda row: (-abs(_lost_share(row)), row.index))[:MAX_CLASSES]
        return tuple(sorted(changed, key=lambda row: (-_lost_share(row), row.index)))

    def _confusions(self) -> tuple[Confusion, ...]:
        """Return the mistakes that the student makes more often than its teacher, most first."""
        teacher, student = self.predictions["teacher"], self.predictions["student"]
        rows = [
            Confusion(label, predicted, teacher[label, predicted] if teacher else None, count)
            for (label, predicted), count in student.items()
            if label != predicted and count > teacher[label, predicted]
        ]
        return tuple(sorted(rows, key=_confusion_order)[:MAX_CONFUSIONS])


class FeatureTally:
    """Sums over images, of models without classes, whose outputs are features."""

    def __init__(self) -> None:
        self.count = self.skipped = 0
        self.cosine: float | None = None

    def __add__(self, other: FeatureTally) -> FeatureTally:
        """Return the sums over the images of both."""
        total = FeatureTally()
        total.count, total.skipped = self.count + other.count, self.skipped + other.skipped
        cosines = [tally.cosine for tally in (self, other) if tally.cosine is not None]
        total.cosine = sum(cosines) if cosines else None
        return total

    def add(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        """Add a batch, in place.

        Args:
            student: features `[B, C]`, or `[B, N, C]` without pooling.
            teacher: features of the same shape; None without a teacher.
            labels: `[B]`; only their number is used.
        """
        self.count += len(labels)
        if teacher is not None:  # without pooling, the mean over the tokens of each image
            cosine = F.cosine_similarity(student, teacher, dim=-1).flatten(1 if student.ndim > 2 else 0)
            per_image = cosine.mean(dim=1) if cosine.ndim > 1 else cosine
            self.cosine = (self.cosine or 0.0) + float(per_image.double().sum())

    def result(self, name: str) -> Accuracy:
        """Return the similarity on the images, which are called `name`."""
        cosine = None if self.cosine is None else round(self.cosine / self.count, 6)
        return unlabeled(FEATURES.name, name, self.count, self.skipped, feature_cosine=cosine)


TALLIES: Mapping[str, Callable[[], Tally]] = {
    "classes": LogitTally,
    "multi_label": MultiLabelTally,
    "regression": RegressionTally,
    "features": FeatureTally,
}
"""The sums to measure by the kind of a model's outputs."""


def paired_interval(only_teacher: int, only_student: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the drop in top-1 of two models on the same images.

    Args:
        only_teacher: images that only the teacher classifies correctly.
        only_student: images that only the student classifies correctly.
        count: all images.

    Returns:
        Lower and upper bound, in points.

    Source: Agresti and Min 2005, Statistics in Medicine 24(5): the Wald interval with half an
        observation added to each of the four cells, so that it is not empty if the two models never
        differ.
    """
    b, c, n = only_teacher + 0.5, only_student + 0.5, count + 2
    center = (b - c) / n
    half = 1.959964 * ((b + c) - (b - c) ** 2 / n) ** 0.5 / n
    return round(100 * (center - half), 4), round(100 * (center + half), 4)


def _lost_share(row: ClassHits) -> float:
    """Return the share of images that the student lost or, without a teacher, gets wrong."""
    before = row.num_images if row.teacher_hits is None else row.teacher_hits
    return (before - row.student_hits) / row.num_images


def _confusion_order(row: Confusion) -> tuple[int, int, int]:
    return (row.teacher_images or 0) - row.student_images, row.label, row.predicted
