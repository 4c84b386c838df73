"""Sum up the outputs of models that give each label a probability of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitcompress.families.outputs import MULTI_LABEL
from vitcompress.measure.results import Accuracy, unlabeled

_NO_DEVIATION = torch.ones(1)


class MultiLabelTally:
    """Sums over images; the teacher's decisions at probability 0.5 take the place of labels."""

    def __init__(self) -> None:
        self.count = self.skipped = 0
        self.kl = 0.0
        self.agree = self.decisions = 0
        self.scores: list[Tensor] = []  # the student's logits, `[B, K]` each
        self.positive: list[Tensor] = []  # whether the teacher finds a label, `[B, K]` each

    def __add__(self, other: MultiLabelTally) -> MultiLabelTally:
        """Return the sums over the images of both."""
        total = MultiLabelTally()
        for name, value in vars(total).items():
            setattr(total, name, value + getattr(self, name) + getattr(other, name))
        return total

    def add(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        """Add a batch, in place.

        Args:
            student: logits `[B, K]`.
            teacher: logits `[B, K]`; None without a teacher.
            labels: `[B]`; only their number is used: an image has one class, but several labels.
        """
        self.count += len(labels)
        if teacher is None:
            return
        assert MULTI_LABEL.nats is not None  # logits of labels are a prediction
        self.kl += float(MULTI_LABEL.nats(student.double(), teacher.double(), _NO_DEVIATION).sum())
        self.agree += int(((student > 0) == (teacher > 0)).sum())
        self.decisions += student.numel()
        self.scores.append(student)
        self.positive.append(teacher > 0)

    def result(self, name: str) -> Accuracy:
        """Return the agreement on the images, which are called `name`."""
        if not self.decisions:
            return unlabeled(MULTI_LABEL.name, name, self.count, self.skipped)
        precision = mean_average_precision(self.scores, self.positive)
        return unlabeled(
            MULTI_LABEL.name, name, self.count, self.skipped,
            agreement=round(100 * self.agree / self.decisions, 4), kl=round(self.kl / self.count, 6),
            mean_average_precision=None if precision is None else round(100 * precision, 4),
        )  # fmt: skip


def mean_average_precision(scores: Sequence[Tensor], positive: Sequence[Tensor]) -> float | None:
    """Return the mean over labels of the area under precision against recall, 0–1.

    Args:
        scores: batches of scores, the higher, the likelier the label, `[B, K]` each.
        positive: whether an image has the label, `[B, K]` each; a label that no image has is left
            out.

    Returns:
        None where no image has a label.

    Source: average precision without interpolation; images of equal score enter together, as in
        scikit-learn.
    """
    labels = torch.stack([batch.any(0) for batch in positive]).any(0).nonzero().flatten().tolist()

    def column(batches: Sequence[Tensor], label: int) -> Tensor:  # all at once would take the memory twice
        return torch.cat([batch[:, label] for batch in batches])

    precisions = [_average_precision(column(scores, label), column(positive, label)) for label in labels]
    return sum(precisions) / len(precisions) if precisions else None


def _average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return Σ (R_n − R_{n−1}) P_n over the distinct scores, from `[N]` each."""
    order = scores.argsort(descending=True)
    scores, hits = scores[order], positive[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])  # of its score
    ranks = torch.arange(1, len(scores) + 1, dtype=torch.float64)[last]
    hits = hits[last]
    recalled = torch.diff(hits, prepend=hits.new_zeros(1))
    return float((recalled * hits / ranks).sum() / hits[-1])
