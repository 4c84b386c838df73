"""Words for each kind of outputs in reports; without torch, unlike the kinds themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class KindWords:
    """What a report says of a kind of outputs.

    Attributes:
        outputs: what the outputs are.
        item: what one of them is.
        agreement: what the percentage of agreement counts; empty where there is none.
        differ: what student and teacher do on an example image.
        remark: what the numbers compare, beginning with a space; empty where labels say it.
    """

    outputs: str
    item: str
    agreement: str
    differ: str
    remark: str


CLASSES = KindWords(
    outputs="classes",
    item="class",
    agreement="of images get the same class from both models",
    differ="Student and teacher predict different classes",
    remark="",
)
KIND_WORDS: Mapping[str, KindWords] = {
    "classes": CLASSES,
    "multi_label": KindWords(
        "independent labels", "label", "of labels get the same decision at 0.5 from both models",
        "Student and teacher decide differently on a label",
        " The outputs are logits of independent labels: agreement is over labels at probability 0.5, and precision is "
        "against the teacher's decisions.",
    ),
    "regression": KindWords(
        "numbers", "output", "", "Student and teacher give different numbers",
        " The outputs are numbers: R² and error compare the student's with the teacher's, and the deviation is that of "
        "the teacher's outputs over these images.",
    ),
    "features": KindWords(
        "features", "feature", "", "Student and teacher are compared by their features",
        " The model has no classes: its features are compared with the teacher's.",
    ),
}  # fmt: skip


def words_for(kind: str | None) -> KindWords:
    """Return the words for a kind; those of classes for older reports, which name none."""
    return KIND_WORDS.get(kind or "", CLASSES)
