"""Sum up the outputs of models that give numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitcompress.families.outputs import REGRESSION, floored_deviation
from vitcompress.measure.results import MAX_FITS, Accuracy, OutputFit, unlabeled


class RegressionTally:
    """Sums over images, in float64: errors, and the moments of the teacher's outputs."""

    def __init__(self) -> None:
        self.count = self.skipped = 0
        self.compared = 0
        self.errors = torch.zeros(0, dtype=torch.float64)  # sum of squared errors, `[K]`
        self.mean = torch.zeros(0, dtype=torch.float64)  # of the teacher's outputs, `[K]`
        self.spread = torch.zeros(0, dtype=torch.float64)  # sum of their squared distances from it, `[K]`

    def __add__(self, other: RegressionTally) -> RegressionTally:
        """Return the sums over the images of both."""
        total = RegressionTally()
        total.count, total.skipped = self.count + other.count, self.skipped + other.skipped
        for tally in (self, other):
            if tally.compared:
                total._merge(tally.compared, tally.errors, tally.mean, tally.spread)
        return total

    def add(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        """Add a batch, in place.

        Args:
            student: numbers `[B, K]`.
            teacher: numbers `[B, K]`; None without a teacher.
            labels: `[B]`; only their number is used.
        """
        self.count += len(labels)
        if teacher is not None:
            student, teacher = student.double(), teacher.double()
            mean = teacher.mean(0)
            self._merge(len(teacher), (student - teacher).square().sum(0), mean, (teacher - mean).square().sum(0))

    def _merge(self, count: int, errors: Tensor, mean: Tensor, spread: Tensor) -> None:
        """Add the sums over other images, in place.

        Source: Chan, Golub and LeVeque 1983, The American Statistician 37(3): no difference of
            large sums.
        """
        if not self.compared:
            self.compared, self.errors, self.mean, self.spread = count, errors, mean, spread
            return
        total = self.compared + count
        shift = mean - self.mean
        self.spread = self.spread + spread + shift.square() * self.compared * count / total
        self.mean = self.mean + shift * count / total
        self.errors = self.errors + errors
        self.compared = total

    def result(self, name: str) -> Accuracy:
        """Return the fit on the images, which are called `name`.

        R² of an output is 1 − squared error / variance of the teacher's output; its root is what is
        left of the deviation. Both are means over outputs.
        """
        if not self.compared:
            return unlabeled(REGRESSION.name, name, self.count, self.skipped)
        mean_errors, variance = self.errors / self.compared, self.spread / self.compared
        size = (variance + self.mean.square()).sqrt()
        deviation = floored_deviation(variance.sqrt() if self.compared > 1 else size, size)
        shares = mean_errors / deviation.square()  # of the variance that the student misses
        shares = shares.nan_to_num(nan=math.inf, posinf=math.inf)  # outputs that are not finite fit nothing
        fits = tuple(
            OutputFit(
                index=index, r2=_rounded(1 - float(shares[index])), rmse=_rounded(float(mean_errors[index].sqrt())),
                deviation=_rounded(float(deviation[index])),
            )
            for index in range(len(shares))
        )  # fmt: skip
        worst = sorted(sorted(fits, key=lambda fit: (fit.r2, fit.index))[:MAX_FITS], key=lambda fit: fit.index)
        return unlabeled(
            REGRESSION.name, name, self.count, self.skipped, kl=_rounded(float(shares.sum() / 2)),
            r2=_rounded(1 - float(shares.mean())), relative_rmse=_rounded(float(shares.mean().sqrt())),
            fits=tuple(worst),
        )  # fmt: skip


def _rounded(value: float) -> float:
    """Return a number with six significant digits, within the bounds of a report."""
    return float(f"{max(-1e15, min(1e15, math.inf if math.isnan(value) else value)):.6g}")
