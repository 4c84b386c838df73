"""Tell whether a model outputs class logits or features."""

from __future__ import annotations

from torch import nn


def has_classes(model: nn.Module) -> bool:
    """Return whether `model` outputs class logits; otherwise it outputs features."""
    return bool(getattr(model, "num_classes", 0))
