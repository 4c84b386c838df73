"""Moments are exact where a large mean hides small deviations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitcompress.initialize.regression import Moments, factors_of_full_rank, low_rank, with_ridge


def samples(mean: float, deviation: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and targets in float32, and weights; batches of 4 with 9 tokens."""
    draw = torch.Generator().manual_seed(0)
    x = mean + deviation * torch.randn(12, 9, 6, generator=draw)
    y = mean + deviation * torch.randn(12, 9, 4, generator=draw) + (x[..., :4] - mean)
    return x, y, torch.rand(9, generator=draw).double() + 0.5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_a_large_mean_does_not_swallow_small_deviations(mean: float, weighted: bool) -> None:
    """Without centering, products are 1e6 ± 0.06 in float32; the covariance is 1e-4."""
    x, y, weight = samples(mean, 1e-2)
    moments = Moments()
    for batch in range(0, 12, 4):
        moments.add(x[batch : batch + 4], y[batch : batch + 4], weight if weighted else None)
    w = (weight if weighted else torch.ones(9).double()).expand(12, 9).flatten()
    wide_x, wide_y = x.double().flatten(0, 1), y.double().flatten(0, 1)
    mean_x, mean_y = ((w[:, None] * v).sum(0) / w.sum() for v in (wide_x, wide_y))
    centered_x, centered_y = wide_x - mean_x, wide_y - mean_y
    assert moments.count == pytest.approx(float(w.sum()), rel=1e-6)
    torch.testing.assert_close(moments.mean, mean_x, rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(moments.mean_target, mean_y, rtol=1e-7, atol=1e-6)
    covariance = (w[:, None] * centered_x).T @ centered_x / w.sum()
    cross = (w[:, None] * centered_y).T @ centered_x / w.sum()
    torch.testing.assert_close(moments.centered(), covariance, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(moments.cross(), cross, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(moments.covariance(), with_ridge(moments.centered()))
    second = (w[:, None] * wide_x).T @ wide_x / w.sum()
    torch.testing.assert_close(moments.uncentered(), second, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.second(), with_ridge(moments.uncentered()))
    mixed = (w[:, None] * wide_y).T @ wide_x / w.sum()
    torch.testing.assert_close(moments.cross_uncentered(), mixed, rtol=1e-6, atol=1e-7)


def test_later_batches_may_have_another_mean() -> None:
    x = samples(0.0, 1.0)[0] + torch.arange(12.0)[:, None, None] * 10
    moments = Moments()
    for batch in range(0, 12, 4):
        moments.add(x[batch : batch + 4])
    expected = torch.cov(x.double().flatten(0, 1).T, correction=0)
    torch.testing.assert_close(moments.centered(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (5, 5)])
def test_the_first_factors_of_full_rank_are_the_best_of_each_rank(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=draw, dtype=torch.double)
    mixing = torch.randn(shape[1], shape[1], generator=draw, dtype=torch.double)
    covariance = mixing @ mixing.T
    up, down = factors_of_full_rank(weight, covariance)
    torch.testing.assert_close(up @ down, weight)
    for rank in range(1, 5):
        lost = weight - up[:, :rank] @ down[:rank]
        tail = torch.linalg.svdvals(weight @ mixing)[rank:].square().sum()
        torch.testing.assert_close((lost @ covariance @ lost.T).trace(), tail, rtol=1e-6, atol=1e-8)
        best = low_rank(weight, covariance, rank)
        torch.testing.assert_close(best[0] @ best[1], up[:, :rank] @ down[:rank])
