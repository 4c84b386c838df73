"""Numbers that are measured, as data: accuracy, latency and baselines."""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

MOST_CLASSES = 20  # that a report tells of, and pairs of them: it lies in the file's header
MOST_CONFUSIONS = 10
_FROZEN = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FROZEN)
class ClassHits:
    """How many images of class `index` there are, and on how many of them each model is right; None: no teacher."""

    index: int
    num_images: int
    teacher_hits: int | None
    student_hits: int


@dataclass(frozen=True, config=_FROZEN)
class Confusion:
    """On how many images of class `label` each model says `predicted`, another one; None: no teacher."""

    label: int
    predicted: int
    teacher_images: int | None
    student_images: int


@dataclass(frozen=True, config=_FROZEN)
class Accuracy:
    """Agreement of student and teacher and, where there are labels, accuracy of both.

    Percentages are 0–100, drops are in points (teacher minus student), `kl` in nats per image, `feature_cosine` −1–1.
    None: not measured. Of models without classes there is `feature_cosine` alone, which is no accuracy. `classes` are
    those that changed most, at most 20, and `confusions` those that the student adds most of, at most 10; both are
    empty without labels.
    """

    data: str
    num_images: int
    num_skipped: int
    teacher_top1: float | None
    student_top1: float | None
    teacher_top5: float | None
    student_top5: float | None
    top1_drop: float | None
    top1_drop_ci95: tuple[float, float] | None
    agreement: float | None
    kl: float | None
    feature_cosine: float | None = None
    classes: tuple[ClassHits, ...] = ()
    confusions: tuple[Confusion, ...] = ()


@dataclass(frozen=True, config=_FROZEN)
class Speed:
    """Median latency of one forward pass, in milliseconds, by batch size (`"1"`, `"32"`)."""

    teacher_ms: dict[str, float]
    student_ms: dict[str, float]
    threads: int
    device: str


@dataclass(frozen=True, config=_FROZEN)
class Baseline:
    """What the teacher comes to without sharing and without training, in fewer bits alone.

    Attributes:
        name: how it is stored, like `teacher int8`.
        params: all of the teacher's.
        bytes: of its tensors as stored.
        top1: percent; None where the images have no labels.
        top1_drop: from the teacher as it is, in points.
        agreement: with it, percent; None where the images have labels, or the model has no classes.
        feature_cosine: the same of a model without classes, −1–1.
    """

    name: str
    params: int
    bytes: int
    top1: float | None
    top1_drop: float | None
    agreement: float | None
    feature_cosine: float | None
