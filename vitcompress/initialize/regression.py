"""Least squares on second moments, in float64: what the starts of factors and of narrow blocks have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-4
"""Of the mean variance: keeps directions that the images hardly show from being fitted."""


@dataclass
class Moments:
    """Sums over samples of inputs `x` `[n, D]` and targets `y` `[n, O]`: `x`, `y`, `x xᵀ` and `y xᵀ`."""

    count: float = 0
    x: Tensor | float = 0.0
    y: Tensor | float = 0.0
    xx: Tensor | float = 0.0
    yx: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Count samples, in place.

        Args:
            x: inputs `[B, ..., D]`.
            y: targets `[B, ..., O]`; None where only the inputs matter.
            weight: what each sample counts, `[...]`, the same for each of the batch; None for 1.
        """
        each = torch.ones(x.shape[:-1], dtype=torch.double, device=x.device)
        each = (each if weight is None else each * weight).flatten()[:, None]
        x = x.detach().flatten(0, -2).double()  # in float32 a large mean leaves nothing of small deviations from it
        counted = x if weight is None else x * each
        self.count += float(each.sum())
        self.x = self.x + counted.sum(0)
        self.xx = self.xx + counted.T @ x
        if y is not None:
            y = y.detach().flatten(0, -2).double()
            self.y = self.y + (y * each).sum(0)
            self.yx = self.yx + y.T @ counted

    @property
    def mean(self) -> Tensor:
        """Mean input `[D]`."""
        return self.x / self.count  # type: ignore[return-value]

    @property
    def mean_target(self) -> Tensor:
        """Mean target `[O]`."""
        return self.y / self.count  # type: ignore[return-value]

    def mapped(self, by: Tensor) -> Moments:
        """Return the moments of the same inputs after a permutation `[D]` or rotation `[D, D]`, without targets."""
        x, xx = torch.as_tensor(self.x), torch.as_tensor(self.xx)
        if by.ndim == 1:
            return Moments(self.count, x[by], 0.0, xx[by][:, by])
        return Moments(self.count, by @ x, 0.0, by @ xx @ by.T)

    def covariance(self) -> Tensor:
        """Of the inputs, `[D, D]`, with the ridge."""
        centred: Tensor = self.xx / self.count - self.mean.outer(self.mean)
        return with_ridge(centred)

    def second(self) -> Tensor:
        """E[x xᵀ], `[D, D]`, with the ridge: what counts where no bias takes up the mean."""
        return with_ridge(torch.as_tensor(self.xx / self.count))

    def cross(self) -> Tensor:
        """Covariance of targets and inputs, `[O, D]`."""
        return self.yx / self.count - self.mean_target.outer(self.mean)


def with_ridge(covariance: Tensor) -> Tensor:
    """A covariance `[D, D]` that can be inverted."""
    return covariance + ridge_of(covariance) * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )


def ridge_of(covariance: Tensor) -> Tensor:
    """What `with_ridge` adds to the diagonal, `[]`; never zero, though all inputs may be."""
    return RIDGE * covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).eps)


def regress_near(covariance: Tensor, cross: Tensor, prior: Tensor) -> Tensor:
    """As `regress`, drawn to `prior` `[O, D]` in directions that the images hardly show."""
    return regress(with_ridge(covariance), cross + ridge_of(covariance) * prior)


def regress(covariance: Tensor, cross: Tensor) -> Tensor:
    """The matrix `[O, D]` that predicts targets best: `cross @ inverse(covariance)`."""
    solved: Tensor = torch.linalg.solve(covariance, cross.T).T
    return solved


def roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a covariance `[D, D]` and its inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=RIDGE * 1e-2 * values.max().clamp(min=torch.finfo(values.dtype).eps)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def low_rank(weight: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors `up` `[O, r]` and `down` `[r, D]` whose product does what `weight` `[O, D]` does, as well as rank r can.

    Minimises E‖(weight − up·down) x‖² over inputs x of that covariance: a truncated SVD, whitened by the inputs.
    That is what `weight` says in the directions in which its outputs vary most, so its smaller side is enough.

    Source: Wang et al. 2024, arXiv:2403.07378, Sec. 3.1; reduced-rank regression, Izenman 1975.
    """
    if weight.shape[0] <= weight.shape[1]:
        up = leading(weight @ covariance @ weight.T, rank)
        down = up.T @ weight
    else:
        root, inverse = roots(covariance)
        seen = weight @ root
        basis = leading(seen.T @ seen, rank)
        up, down = seen @ basis, basis.T @ inverse
    size = ((down @ covariance) * down).sum(1).clamp(min=0).sqrt() / up.norm(dim=0).clamp(
        min=torch.finfo(up.dtype).tiny
    )
    scale = size.clamp(min=torch.finfo(up.dtype).tiny).sqrt()[:, None]  # both factors get the same share of the size,
    return up * scale.T, down / scale  # so that one learning rate fits both


def leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors `[D, r]` of a Gram matrix's largest eigenvalues, largest first.

    As good as a singular value decomposition in float64, and many times faster for tall stacks.
    """
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors[:, -rank:].flip(1)
