"""What a model's outputs are: logits of classes, or features."""

from __future__ import annotations

from torch import nn


def has_classes(model: nn.Module) -> bool:
    """Whether a model's outputs are logits of classes; else they are features."""
    return bool(getattr(model, "num_classes", 0))
