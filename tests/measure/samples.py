"""Models and batches that are measured by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitcompress.data.loaders import Batch
from vitcompress.measure import accuracy
from vitcompress.measure.results import Accuracy
from vitcompress.recipe import DataRecipe


class Fixed(nn.Module):
    """Gives image i (its one pixel) row i of a table.

    Args:
        outputs: the table.
        num_classes: 0 if the outputs are features.
    """

    def __init__(self, outputs: Tensor, num_classes: int = 0) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs[x.flatten().long()]


def numbered(labels: list[int], sizes: Iterable[int]) -> list[Batch]:
    """Batches of images 0, 1, 2, …, as `Fixed` takes them."""
    x, y, sizes = torch.arange(float(len(labels))).reshape(-1, 1, 1, 1), torch.tensor(labels), list(sizes)
    return [Batch(a, b, ()) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]


def evaluate(
    student: nn.Module, teacher: nn.Module | None, batches: Iterable[Batch], *, skip_bad_images: bool = False,
    tell: Callable[[float], None] | None = None,
) -> Accuracy:  # fmt: skip
    """Run an `Evaluator` over given batches."""
    images: Any = SimpleNamespace(name="x")
    evaluator = accuracy.Evaluator(images, {}, DataRecipe(skip_bad_images=skip_bad_images))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "evaluation_loader", lambda *args: batches)
        result = evaluator(student, teacher, tell)
    assert result is not None
    return result
