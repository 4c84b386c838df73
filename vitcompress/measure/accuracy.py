"""How good is the student, next to its teacher?"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from vitcompress.data.loaders import Batch, Share, check_readable, evaluation_loader, share_of
from vitcompress.data.sets import ImageSet
from vitcompress.errors import DataError
from vitcompress.families.outputs import has_classes
from vitcompress.measure.results import MOST_CLASSES, MOST_CONFUSIONS, Accuracy, ClassHits, Confusion
from vitcompress.recipe import DataRecipe
from vitcompress.runtime.processes import gathered

MOST_AT_ONCE = 128  # images
Watch = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]


def evaluate_pair(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[Batch],
    *,
    name: str,
    device: torch.device,
    skip_bad_images: bool = False,
    features: bool = False,
    together: Accelerator | None = None,
    watch: Watch | None = None,
    tell: Callable[[float], None] | None = None,
) -> Accuracy:
    """Run both models over the same images.

    Args:
        student: in eval mode, on `device`.
        teacher: the same; None where there is none.
        batches: every image once; labels of -1 mean that there are none.
        name: of the images, for the report.
        device: where the models are.
        skip_bad_images: count unreadable images instead of stopping.
        features: the outputs are features and not logits; labels mean nothing then.
        together: knows the processes that have a part of the batches each, and all get the whole result; None where
            this process has all.
        watch: told of each batch of this process: images, logits of student and teacher, labels.
        tell: told the share of this process's batches that is done, 0–1; never, where nobody knows how many they are.

    Raises:
        DataError: an unreadable image, or none that is readable.
    """
    tally: _Tally | _FeatureTally = _FeatureTally() if features else _Tally()
    fault: DataError | None = None
    with torch.inference_mode():
        for batch in _told_of(batches, tell):
            try:
                tally.skipped += check_readable(batch, skip=skip_bad_images)
            except DataError as error:
                fault = error
                break
            if len(batch.labels) == 0:
                continue
            images = batch.images.to(device, non_blocking=True)
            outputs = student(images).float().cpu(), teacher(images).float().cpu() if teacher else None
            tally.add(*outputs, batch.labels)
            if watch is not None:
                watch(batch.images, *outputs, batch.labels)
    everyone = gathered((tally, fault), together) if together else [(tally, fault)]
    for _, theirs in everyone:
        if theirs is not None:
            raise theirs
    whole: _Tally | _FeatureTally = functools.reduce(operator.add, (each for each, _ in everyone))
    if whole.count == 0:
        raise DataError(f"{name}: not one image could be read.")
    return whole.result(name)


def _told_of(batches: Iterable[Batch], tell: Callable[[float], None] | None) -> Iterator[Batch]:
    """The same batches, each told of once it is over."""
    total = operator.length_hint(batches, 0)
    for number, batch in enumerate(batches, 1):
        yield batch
        if tell and total:
            tell(number / total)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Runs models over a set of images, a part of them in each process.

    Attributes:
        images: to evaluate on; None where there are none.
        config: timm's data config.
        recipe: batch size and workers.
        accelerator: knows the processes, which all get the whole result.
        accumulate: parts that a process takes its images of a training step in.
    """

    images: ImageSet | None
    config: Mapping[str, Any]
    recipe: DataRecipe
    accelerator: Accelerator | None = None
    accumulate: int = 1

    @property
    def batch_size(self) -> int:
        """Images that a process evaluates at once: no more than it trains on."""
        parts: int = (self.accelerator.num_processes if self.accelerator else 1) * self.accumulate
        return min(MOST_AT_ONCE, max(1, self.recipe.batch_size // parts))

    def __call__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        tell: Callable[[float], None] | None = None,
        watch: Watch | None = None,
    ) -> Accuracy | None:
        """Evaluate a student; None where there are no images.

        Args:
            student: in eval mode, on the accelerator's device.
            teacher: the same; None where there is none.
            tell: told the share that is done, 0–1.
        """
        if self.images is None:
            return None
        share = share_of(self.accelerator) if self.accelerator else Share()
        batches = evaluation_loader(self.images, self.config, self.recipe, share, self.batch_size)
        return evaluate_pair(
            student, teacher, batches, name=self.images.name, device=next(student.parameters()).device,
            skip_bad_images=self.recipe.skip_bad_images, features=not has_classes(student), together=self.accelerator,
            tell=tell, watch=watch,
        )  # fmt: skip


class _Tally:
    """Sums over images."""

    def __init__(self) -> None:
        self.count = self.skipped = self.agree = 0
        self.hits: Counter[str] = Counter()
        self.said: dict[str, Counter[tuple[int, int]]] = {"student": Counter(), "teacher": Counter()}  # label, answer
        self.only_teacher = self.only_student = 0
        self.kl = 0.0
        self.labelled = self.paired = False

    def __add__(self, other: _Tally) -> _Tally:
        both = _Tally()
        both.hits.update(self.hits)
        both.hits.update(other.hits)  # not +, which leaves out what is zero
        for who, said in both.said.items():
            said.update(self.said[who])
            said.update(other.said[who])
        both.labelled, both.paired = self.labelled or other.labelled, self.paired or other.paired
        for name in ("count", "skipped", "agree", "only_teacher", "only_student", "kl"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def add(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        self.count += len(labels)
        self.labelled = bool((labels >= 0).all())
        self.paired = teacher is not None
        right = {}
        for who, logits in (("student", student), ("teacher", teacher)):
            if logits is not None and self.labelled:
                top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                right[who] = top[:, 0]
                self.said[who].update(zip(labels.tolist(), logits.argmax(1).tolist(), strict=True))
                self.hits[f"{who}1"] += int(top[:, 0].sum())
                self.hits[f"{who}5"] += int(top.sum())
        if teacher is not None:
            self.agree += int((student.argmax(1) == teacher.argmax(1)).sum())
            log_p, log_q = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
            self.kl += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
        if len(right) == 2:
            self.only_teacher += int((right["teacher"] & ~right["student"]).sum())
            self.only_student += int((right["student"] & ~right["teacher"]).sum())

    def result(self, name: str) -> Accuracy:
        def percent(key: str) -> float | None:
            return round(100 * self.hits[key] / self.count, 4) if key in self.hits else None

        drop = interval = None
        if self.labelled and self.paired:
            drop = round(100 * (self.only_teacher - self.only_student) / self.count, 4)
            interval = paired_interval(self.only_teacher, self.only_student, self.count)
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
            agreement=round(100 * self.agree / self.count, 4) if self.paired else None,
            kl=round(self.kl / self.count, 6) if self.paired else None,
            classes=self.classes() if self.labelled else (),
            confusions=self.confusions() if self.labelled else (),
        )

    def classes(self) -> tuple[ClassHits, ...]:
        """The classes that changed most, the worst first; without a teacher, those that the student knows least."""
        images: Counter[int] = Counter()
        for (label, _), count in self.said["student"].items():
            images[label] += count
        teacher, student = self.said["teacher"], self.said["student"]
        every = [
            ClassHits(index, count, teacher[index, index] if self.paired else None, student[index, index])
            for index, count in images.items()
        ]
        most = sorted(every, key=lambda row: (-abs(_lost(row)), row.index))[:MOST_CLASSES]
        return tuple(sorted(most, key=lambda row: (-_lost(row), row.index)))

    def confusions(self) -> tuple[Confusion, ...]:
        """What the student confuses more often than its teacher does, or at all where there is none."""
        teacher, student = self.said["teacher"], self.said["student"]
        every = [
            Confusion(label, answer, teacher[label, answer] if self.paired else None, count)
            for (label, answer), count in student.items()
            if label != answer and count > teacher[label, answer]
        ]
        return tuple(sorted(every, key=_by_added)[:MOST_CONFUSIONS])


def _lost(row: ClassHits) -> float:
    """Share of a class's images that only the teacher gets right on balance; of one model, that it gets wrong."""
    before = row.num_images if row.teacher_hits is None else row.teacher_hits
    return (before - row.student_hits) / row.num_images


def _by_added(row: Confusion) -> tuple[int, int, int]:
    return (row.teacher_images or 0) - row.student_images, row.label, row.predicted


class _FeatureTally:
    """Sums over images, of models whose outputs are features."""

    def __init__(self) -> None:
        self.count = self.skipped = 0
        self.cosine: float | None = None

    def __add__(self, other: _FeatureTally) -> _FeatureTally:
        both = _FeatureTally()
        both.count, both.skipped = self.count + other.count, self.skipped + other.skipped
        cosines = [each.cosine for each in (self, other) if each.cosine is not None]
        both.cosine = sum(cosines) if cosines else None
        return both

    def add(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        self.count += len(labels)
        if teacher is not None:  # where nothing is pooled, the mean over tokens of each image
            cosine = F.cosine_similarity(student, teacher, dim=-1).flatten(1 if student.ndim > 2 else 0)
            per_image = cosine.mean(dim=1) if cosine.ndim > 1 else cosine
            self.cosine = (self.cosine or 0.0) + float(per_image.double().sum())

    def result(self, name: str) -> Accuracy:
        cosine = None if self.cosine is None else round(self.cosine / self.count, 6)
        return Accuracy(
            data=name, num_images=self.count, num_skipped=self.skipped, teacher_top1=None, student_top1=None,
            teacher_top5=None, student_top5=None, top1_drop=None, top1_drop_ci95=None, agreement=None, kl=None,
            feature_cosine=cosine,
        )  # fmt: skip


def paired_interval(only_teacher: int, only_student: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of the drop in top-1 between two models run on the same images.

    Args:
        only_teacher: images that only the teacher got right.
        only_student: images that only the student got right.
        count: all images.

    Returns:
        Lower and upper bound, in points.

    Source: Agresti and Min 2005, Statistics in Medicine 24(5): the Wald interval with half an observation added to
        each of the four cells, so that it is not empty where the two models never differ.
    """
    b, c, n = only_teacher + 0.5, only_student + 0.5, count + 2
    centre = (b - c) / n
    half = 1.959964 * ((b + c) - (b - c) ** 2 / n) ** 0.5 / n
    return round(100 * (centre - half), 4), round(100 * (centre + half), 4)
