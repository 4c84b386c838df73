"""Digests depend on names, types, shapes and values of weights."""

import torch
from torch import Tensor

from vitcompress.artifact.digest import sha256_of


def test_the_digest_knows_names_shapes_types_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    variants: list[dict[str, Tensor]] = [
        base,
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3).half(), "b": torch.ones(1)},
        {"c": torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": -torch.ones(1)},
    ]
    assert len({sha256_of(weights) for weights in variants}) == len(variants)
    assert sha256_of(dict(reversed(base.items()))) == sha256_of(base)
