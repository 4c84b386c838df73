"""Bases of one block are those of a truncated singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitcompress.initialize.factors import basis_of_readers, basis_of_writers
from vitcompress.initialize.regression import regress


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_basis_of_one_block_is_its_best_factor(rank: int) -> None:
    weight, mixing = noise(7, 5), noise(5, 5, seed=1)
    covariance = mixing @ mixing.T
    tail = torch.linalg.svdvals(weight @ mixing)[rank:].square().sum()
    rows = basis_of_readers({"a": weight}, {"a": covariance})[:rank]
    read = regress(rows @ covariance @ rows.T, weight @ covariance @ rows.T) @ rows
    columns = basis_of_writers({"a": weight}, {"a": covariance})[:, :rank]
    for product in (read, columns @ columns.T @ weight):
        lost = weight - product
        torch.testing.assert_close((lost @ covariance @ lost.T).trace(), tail, rtol=1e-6, atol=1e-8)


def test_the_basis_of_several_blocks_spans_what_all_of_them_use() -> None:
    """Two blocks that read two directions each, one of them in common: rank 3 loses nothing."""
    directions = torch.linalg.qr(noise(6, 6))[0][:3]
    weights = {"a": noise(5, 2) @ directions[:2], "b": noise(5, 2, seed=1) @ directions[1:]}
    moments = {"a": torch.eye(6).double(), "b": torch.eye(6).double()}
    rows = basis_of_readers(weights, moments)
    for weight in weights.values():
        torch.testing.assert_close(weight @ torch.linalg.pinv(rows[:3]) @ rows[:3], weight)
    columns = basis_of_writers({name: weight.T for name, weight in weights.items()}, {
        "a": torch.eye(5).double(), "b": torch.eye(5).double(),
    })  # fmt: skip
    for weight in weights.values():
        torch.testing.assert_close(columns[:, :3] @ columns[:, :3].T @ weight.T, weight.T)
