"""Maps of heads keep what can be kept with so few channels: closed forms of singular values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitcompress.initialize.narrow import head_maps, value_maps
from vitcompress.initialize.regression import Moments, regress, roots


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_narrow_products_lose_the_tail_of_the_weighted_singular_values(width: int) -> None:
    q, k = Moments(), Moments()
    q.add(noise(400, 12) @ noise(12, 12, seed=1) + 1.0)
    k.add(noise(400, 12, seed=2) @ noise(12, 12, seed=3) + 1.0)
    for head, (queries, keys) in enumerate(head_maps(q, k, 2)):
        part = slice(6 * head, 6 * head + 6)
        q_root, k_root = roots(q.uncentered()[part, part])[0], roots(k.covariance()[part, part])[0]
        change = queries[:width].T @ keys[:width] - torch.eye(6)
        tail = torch.linalg.svdvals(q_root @ k_root)[width:].square().sum()
        torch.testing.assert_close((q_root @ change @ k_root).square().sum(), tail)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_narrow_values_lose_the_tail_of_what_the_projection_writes(width: int) -> None:
    mixing, weight = noise(6, 6), noise(9, 6, seed=1)
    covariance = mixing @ mixing.T
    rows = value_maps(covariance, weight, 1)[0][:width]
    products = covariance @ rows.T
    lost = weight - regress(rows @ products, weight @ products) @ rows
    tail = torch.linalg.svdvals(weight @ mixing)[width:].square().sum()
    torch.testing.assert_close((lost @ covariance @ lost.T).trace(), tail, rtol=1e-6, atol=1e-8)


def test_maps_of_all_channels_are_invertible() -> None:
    q, k = Moments(), Moments()
    q.add(noise(50, 8))
    k.add(noise(50, 8, seed=1))
    for queries, keys in head_maps(q, k, 2):
        torch.testing.assert_close(queries.T @ keys, torch.eye(4, dtype=torch.double))
    assert [tuple(rows.shape) for rows in value_maps(q.covariance(), noise(5, 8), 2)] == [(4, 4), (4, 4)]
