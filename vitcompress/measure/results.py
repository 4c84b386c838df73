"""What is measured, as data: accuracy, latency and baselines.

The bounds of the fields are checked when a report is read from a file, by the settings of `Report`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from vitcompress.plans.bounds import Count, Number, Percent, Points, Positive, PositiveCount, Text

MIN_IMAGES = 30  # with fewer, a result no better than chance is only a note
MAX_CLASSES = 20  # in a report: it is part of the file's header
MAX_CONFUSIONS = 10
_Batch = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
_Latencies = Annotated[dict[_Batch, Positive], Field(max_length=64)]


@dataclass(frozen=True)
class ClassHits:
    """Correct predictions for one class.

    Attributes:
        index: number of the class.
        num_images: images of the class.
        teacher_hits: images that the teacher classifies correctly; None without a teacher.
        student_hits: images that the student classifies correctly.
    """

    index: Count
    num_images: PositiveCount
    teacher_hits: Count | None
    student_hits: Count


@dataclass(frozen=True)
class Confusion:
    """Images of one class that a model takes for another class.

    Attributes:
        label: number of the images' class.
        predicted: number of the class they are taken for.
        teacher_images: images that the teacher confuses; None without a teacher.
        student_images: images that the student confuses.
    """

    label: Count
    predicted: Count
    teacher_images: Count | None
    student_images: Count


@dataclass(frozen=True)
class Accuracy:
    """Agreement of student and teacher and, with labels, accuracy of both; None: not measured.

    Attributes:
        data: name of the images.
        num_images: images that could be read.
        num_skipped: unreadable images that were skipped.
        teacher_top1: in percent.
        student_top1: in percent.
        teacher_top5: in percent.
        student_top5: in percent.
        top1_drop: teacher minus student, in points.
        top1_drop_ci95: 95 % confidence interval of the drop, in points.
        agreement: images for which both models predict the same class, in percent.
        kl: KL divergence of the student from the teacher, in nats per image.
        feature_cosine: mean cosine similarity, −1 to 1; the only measure without classes.
        classes: the classes that changed most, at most 20; empty without labels.
        confusions: the student's most frequent added mistakes, at most 10; empty without labels.
        chance_top1: of a guess that is always the commonest class, in percent.
        above_chance: whether the teacher (without one, the student) is better than that, by a
            one-sided binomial test at 1 %.
    """

    data: Text
    num_images: PositiveCount
    num_skipped: Count
    teacher_top1: Percent | None
    student_top1: Percent | None
    teacher_top5: Percent | None
    student_top5: Percent | None
    top1_drop: Points | None
    top1_drop_ci95: tuple[Number, Number] | None
    agreement: Percent | None
    kl: Number | None
    feature_cosine: Number | None = None
    classes: Annotated[tuple[ClassHits, ...], Field(max_length=100)] = ()
    confusions: Annotated[tuple[Confusion, ...], Field(max_length=100)] = ()
    chance_top1: Percent | None = None
    above_chance: bool | None = None

    @property
    def is_at_chance(self) -> bool:
        """Whether enough labeled images show that the teacher is no better than chance."""
        return self.above_chance is False and self.num_images >= MIN_IMAGES


@dataclass(frozen=True)
class Speed:
    """Median latency of one forward pass.

    Attributes:
        teacher_ms: milliseconds by batch size (`"1"`, `"32"`).
        student_ms: the same for the student.
        threads: of the CPU.
        device: name of the device.
    """

    teacher_ms: _Latencies
    student_ms: _Latencies
    threads: Count
    device: Text


@dataclass(frozen=True)
class Baseline:
    """The whole teacher in fewer bits: neither shared nor trained.

    Attributes:
        name: like `teacher int8`.
        params: number of the teacher's parameters.
        bytes: size of its tensors as stored.
        top1: in percent; None without labels.
        top1_drop: from the teacher itself, in points.
        agreement: with the teacher itself, in percent; None with labels, or without classes.
        feature_cosine: mean cosine similarity with the teacher's features, −1 to 1; None with
            classes.
    """

    name: Text
    params: PositiveCount
    bytes: PositiveCount
    top1: Percent | None
    top1_drop: Number | None
    agreement: Percent | None
    feature_cosine: Number | None
