"""Least squares on second moments, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-4
"""Ridge as a share of the mean variance; damps directions in which the images hardly vary."""

ZERO = torch.zeros((), dtype=torch.double)


@dataclass
class Moments:
    """Sums of `x`, `y`, `x xᵀ` and `y xᵀ` over samples of inputs x `[D]` and targets y `[O]`."""

    count: float = 0
    x: Tensor = ZERO
    y: Tensor = ZERO
    xx: Tensor = ZERO
    yx: Tensor = ZERO

    def add(self, x: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add samples, in place.

        Args:
            x: inputs `[B, ..., D]`.
            y: targets `[B, ..., O]`; None where only the inputs matter.
            weight: weights of the samples, `[...]`, the same for each image of the batch; None for
                1.
        """
        weights = torch.ones(x.shape[:-1], dtype=torch.double, device=x.device)
        weights = (weights if weight is None else weights * weight).flatten()[:, None]
        x = x.detach().flatten(0, -2).double()  # in float32, a large mean swallows small deviations
        weighted = x if weight is None else x * weights
        self.count += float(weights.sum())
        self.x = self.x + weighted.sum(0)
        self.xx = self.xx + weighted.T @ x
        if y is not None:
            y = y.detach().flatten(0, -2).double()
            self.y = self.y + (y * weights).sum(0)
            self.yx = self.yx + y.T @ weighted

    @property
    def mean(self) -> Tensor:
        """Mean of the inputs, `[D]`."""
        return self.x / self.count

    @property
    def mean_target(self) -> Tensor:
        """Mean of the targets, `[O]`."""
        return self.y / self.count

    def mapped(self, by: Tensor) -> Moments:
        """Return the moments of permuted (`[D]`) or rotated (`[D, D]`) inputs, without targets."""
        if by.ndim == 1:
            return Moments(self.count, self.x[by], xx=self.xx[by][:, by])
        return Moments(self.count, by @ self.x, xx=by @ self.xx @ by.T)

    def covariance(self) -> Tensor:
        """Return the covariance of the inputs, `[D, D]`, with the ridge."""
        return with_ridge(self.xx / self.count - self.mean.outer(self.mean))

    def second(self) -> Tensor:
        """Return E[x xᵀ], `[D, D]`, with the ridge; for layers where no bias takes up the mean."""
        return with_ridge(self.xx / self.count)

    def cross(self) -> Tensor:
        """Return the covariance of targets and inputs, `[O, D]`."""
        return self.yx / self.count - self.mean_target.outer(self.mean)


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
    solved: Tensor = torch.linalg.solve(covariance, cross.T).T
    return solved


def roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a covariance `[D, D]` and the inverse of the root."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=RIDGE * 1e-2 * values.max().clamp(min=torch.finfo(values.dtype).eps)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def low_rank(weight: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factorize a matrix so that its outputs change least.

    Minimizes E‖(weight − up·down) x‖²: a truncated SVD, whitened by the inputs. It keeps the
    directions in which the outputs vary most, so an eigendecomposition of the smaller side is
    enough.

    Args:
        weight: matrix `[O, D]`.
        covariance: covariance of the inputs x, `[D, D]`.
        rank: r.

    Returns:
        Factors `up` `[O, r]` and `down` `[r, D]`.

    Source: Wang et al. 2024, arXiv:2403.07378, Sec. 3.1; reduced-rank regression, Izenman 1975.
    """
    if weight.shape[0] <= weight.shape[1]:
        up = leading(weight @ covariance @ weight.T, rank)
        down = up.T @ weight
    else:
        root, inverse = roots(covariance)
        whitened = weight @ root
        basis = leading(whitened.T @ whitened, rank)
        up, down = whitened @ basis, basis.T @ inverse
    tiny = torch.finfo(up.dtype).tiny
    size = ((down @ covariance) * down).sum(1).clamp(min=0).sqrt() / up.norm(dim=0).clamp(min=tiny)
    scale = size.clamp(min=tiny).sqrt()[:, None]  # balances the factors, so that one learning rate fits both
    return up * scale.T, down / scale


def leading(gram: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors `[D, r]` of a Gram matrix's largest eigenvalues, largest first.

    In float64 this is as accurate as an SVD, and many times faster for tall matrices.
    """
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors[:, -rank:].flip(1)
