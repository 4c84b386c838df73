"""Least squares on second moments, in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-4
"""Ridge as a share of the mean variance; damps directions in which the images hardly vary."""

ZERO = torch.zeros((), dtype=torch.double)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; on the CPU where its device has no float64 (Apple's GPUs)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


@dataclass
class Moments:
    """Means and covariances over samples of inputs x `[D]` and targets y `[O]`.

    Sums are in float64. Products of samples are in the samples' own type, after the first batch's
    mean is subtracted: in float32, a large mean would swallow small deviations.

    Attributes:
        count: sum of the samples' weights.
        x: mean of the inputs `[D]` times `count`.
        y: the same of the targets, `[O]`.
        xx: covariance of the inputs, `[D, D]`, times `count`, around `origin`.
        yx: covariance of targets and inputs, `[O, D]`, times `count`, around `origin`.
        origin: what is subtracted from inputs, `[D]`, and from targets, `[O]`.
    """

    count: float | Tensor = 0
    x: Tensor = ZERO
    y: Tensor = ZERO
    xx: Tensor = ZERO
    yx: Tensor = ZERO
    origin: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add samples, in place.

        Args:
            x: inputs `[B, ..., D]`.
            y: targets `[B, ..., O]`; None where only the inputs matter.
            weight: weights of the samples, `[...]`, the same for each image of the batch; None for
                1.
        """
        rows = _samples(x)
        if self.origin is None:
            self.origin = rows.mean(0), ZERO if y is None else _samples(y).mean(0)
        weights = None if weight is None else weight.to(rows).expand(x.shape[:-1]).reshape(-1, 1)
        centered = rows - self.origin[0]
        weighted = centered if weights is None else centered * weights
        count = len(rows) if weights is None else wide(weights).sum()
        self.count = self.count + count
        self.x = self.x + wide(weighted.sum(0)) + count * wide(self.origin[0])
        self.xx = self.xx + wide(weighted.T @ centered)
        if y is not None:
            targets = _samples(y) - self.origin[1]
            self.y = self.y + wide((targets if weights is None else targets * weights).sum(0))
            self.y = self.y + count * wide(self.origin[1])
            self.yx = self.yx + wide(targets.T @ weighted)

    @property
    def mean(self) -> Tensor:
        """Mean of the inputs, `[D]`."""
        return self.x / self.count

    @property
    def mean_target(self) -> Tensor:
        """Mean of the targets, `[O]`."""
        return self.y / self.count

    def centered(self) -> Tensor:
        """Return the covariance of the inputs, `[D, D]`, without the ridge."""
        offset = self._offset(0, self.mean)
        return self.xx / self.count - offset.outer(offset)

    def covariance(self) -> Tensor:
        """Return the covariance of the inputs, `[D, D]`, with the ridge."""
        return with_ridge(self.centered())

    def uncentered(self) -> Tensor:
        """Return E[x xᵀ], `[D, D]`, without the ridge."""
        return self.centered() + self.mean.outer(self.mean)

    def second(self) -> Tensor:
        """Return E[x xᵀ], `[D, D]`, with the ridge; for layers where no bias takes up the mean."""
        return with_ridge(self.uncentered())

    def cross(self) -> Tensor:
        """Return the covariance of targets and inputs, `[O, D]`."""
        return self.yx / self.count - self._offset(1, self.mean_target).outer(self._offset(0, self.mean))

    def cross_uncentered(self) -> Tensor:
        """Return E[y xᵀ], `[O, D]`; for layers where no bias takes up the mean."""
        return self.cross() + self.mean_target.outer(self.mean)

    def _offset(self, side: int, mean: Tensor) -> Tensor:
        """Difference of a mean from what was subtracted, of inputs (0) or targets (1)."""
        assert self.origin is not None  # there are samples
        return mean - wide(self.origin[side])


def _samples(x: Tensor) -> Tensor:
    """Samples `[N, D]` in at least float32."""
    x = x.detach().flatten(0, -2)
    return x if x.dtype == torch.double else x.float()


def with_ridge(covariance: Tensor) -> Tensor:
    """Return a covariance `[D, D]` with the ridge on its diagonal, so that it can be inverted."""
    return covariance + ridge(covariance) * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def ridge(covariance: Tensor) -> Tensor:
    """Return the ridge of a covariance `[D, D]`, `[]`; positive even where all inputs are zero."""
    return RIDGE * covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).eps)


def regress_near(covariance: Tensor, cross: Tensor, prior: Tensor) -> Tensor:
    """Regress with a ridge towards `prior` `[O, D]`, where the images hardly vary."""
    return regress(with_ridge(covariance), cross + ridge(covariance) * prior)


def regress(covariance: Tensor, cross: Tensor) -> Tensor:
    """Return the matrix `[O, D]` that predicts the targets best: `cross @ inverse(covariance)`."""
    root, failed = torch.linalg.cholesky_ex(covariance)  # half of the time of a general solver
    solved = torch.linalg.solve(covariance, cross.T) if failed else torch.cholesky_solve(cross.T, root)
    return solved.T


def total_of(matrices: Iterable[Tensor]) -> Tensor:
    """Return the sum without stacking the matrices, which takes gigabytes in a large model."""
    return functools.reduce(torch.add, matrices)


def roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a covariance `[D, D]` and the inverse of the root."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=RIDGE * 1e-2 * values.max().clamp(min=torch.finfo(values.dtype).eps)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def low_rank(weight: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factorize a matrix so that its outputs change least.

    Minimizes E‖(weight − up·down) x‖²: a truncated SVD, whitened by the inputs.

    Args:
        weight: matrix `[O, D]`.
        covariance: covariance of the inputs x, `[D, D]`.
        rank: r.

    Returns:
        Factors `up` `[O, r]` and `down` `[r, D]`.

    Source: Wang et al. 2024, arXiv:2403.07378, Sec. 3.1; reduced-rank regression, Izenman 1975.
    """
    up, down = factors_of_full_rank(weight, covariance)
    up, down = up[:, :rank], down[:rank]
    tiny = torch.finfo(up.dtype).tiny
    size = ((down @ covariance) * down).sum(1).clamp(min=0).sqrt() / up.norm(dim=0).clamp(min=tiny)
    scale = size.clamp(min=tiny).sqrt()[:, None]  # balances the factors, so that one learning rate fits both
    return up * scale.T, down / scale


def factors_of_full_rank(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize a matrix so that its first r columns and rows are the best factors of rank r.

    They keep the directions in which the outputs vary most, so an eigendecomposition of the smaller
    side is enough.

    Args:
        weight: matrix `[O, D]`.
        covariance: covariance of the inputs, `[D, D]`.

    Returns:
        Factors `[O, R]` and `[R, D]`, R the smaller of O and D.
    """
    if weight.shape[0] <= weight.shape[1]:
        up = leading(weight @ covariance @ weight.T, len(weight))
        return up, up.T @ weight
    root, inverse = roots(covariance)
    whitened = weight @ root
    basis = leading(whitened.T @ whitened, len(covariance))
    return whitened @ basis, basis.T @ inverse


def leading(gram: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors `[D, r]` of a Gram matrix's largest eigenvalues, largest first.

    In float64 this is as accurate as an SVD, and many times faster for tall matrices.
    """
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors[:, -rank:].flip(1)
