"""Models and searches for the tests of the search."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from tests.factories import ROWS, images
from vitcompress.search.model import Search

ROOMY: dict[str, Any] = {"embed_dim": 48, "depth": 6, "num_heads": 3}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(ROWS[name].architecture, **ROWS[name].args)
    return model.eval()


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def search_of(teacher: nn.Module, **more: Any) -> Search:
    given: dict[str, Any] = {
        "teacher": teacher, "name": "tiny", "images": images(teacher, 12), "store": None, "token_kernel": 3,
        "transforms": (), "header_bytes": lambda plan, store: 1000, "drop": lambda student: 0.0,
        "tell": lambda done: None, "say": lambda text: None,
    }  # fmt: skip
    return Search(**{**given, **more})
