"""Models and searches for the tests of the search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tests.factories import ROWS, images, tiny
from vitcompress.families.registry import family_of
from vitcompress.recipe import KINDS
from vitcompress.search.model import Search
from vitcompress.search.options import Shapes

ROOMY: dict[str, Any] = {"embed_dim": 48, "depth": 6, "num_heads": 3}


def lively(variant: str = "vit", **more: Any) -> nn.Module:
    """A model whose blocks matter; timm's matrices at random are too small to be missed."""
    model = tiny(variant, **more)
    with torch.no_grad():
        for name, matrix in model.named_parameters():
            if matrix.ndim > 1 and name.startswith(("blocks.", "head.")):
                matrix.mul_(8 if name.startswith("blocks.") else 4)
    return model


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(ROWS[name].architecture, **ROWS[name].args)
    return model.eval()


def noise(count: int, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shapes_of(teacher: nn.Module, kinds: Sequence[str] = KINDS, **more: Any) -> Shapes:
    family = family_of(teacher, "tiny")
    return Shapes(teacher, family, family.block_names(teacher), kinds, (), 3, **more)


def search_of(teacher: nn.Module, **more: Any) -> Search:
    x = images(teacher, 24)
    given: dict[str, Any] = {
        "teacher": teacher, "name": "tiny", "fitted": x[:16], "judged": x[16:], "store": None, "token_kernel": 3,
        "transforms": (), "multiple": 8, "memory_bytes": 1e9, "header_bytes": lambda plan, store: 1000,
        "drop": lambda student: 0.0, "say": lambda text: None,
    }  # fmt: skip
    return Search(**{**given, **more})
