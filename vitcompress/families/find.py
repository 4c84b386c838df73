"""Which models can be compressed?  The table below; a new family is one file and one line of it."""

from __future__ import annotations

from torch import nn

from vitcompress.errors import ModelError
from vitcompress.families.base import Family
from vitcompress.families.beit import BEIT
from vitcompress.families.eva import EVA
from vitcompress.families.swin import SWIN
from vitcompress.families.swin_v2 import SWIN_V2
from vitcompress.families.vit import VIT

FAMILIES: tuple[Family, ...] = (VIT, SWIN, SWIN_V2, BEIT, EVA)


def find_family(model: nn.Module) -> Family | None:
    """Return the family that a model belongs to; None where there is none."""
    return next((family for family in FAMILIES if isinstance(model, family.model_type)), None)


def family_of(model: nn.Module, name: str) -> Family:
    """The family that `model` belongs to.

    Args:
        model: a timm model, on any device.
        name: what the user called it, for the message.

    Raises:
        ModelError: no family covers the model.
    """
    family = find_family(model)
    if family is not None:
        return family
    known = ", ".join(f"{family.name} ({family.model_type.__name__})" for family in FAMILIES)
    raise ModelError(
        f"{name} is a {type(model).__name__}, which cannot be compressed.",
        hint=f"Name a model of one of these families, like deit_small: {known}. A new one is one file: "
        "docs/how-to/adding-a-family.md.",
    )


def family_named(name: str) -> Family:
    """The family stored under `name` in an artifact.

    Raises:
        ModelError: this version has no such family.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ModelError(f"No family is called {name!r}.", hint="A newer vitcompress may have it.")
