"""Find the family of a model in the table `FAMILIES`.

A new family is one file and one line of this table.
"""

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
    """Return the family of `model`, or None if it has none."""
    return next((family for family in FAMILIES if isinstance(model, family.model_type)), None)


def family_of(model: nn.Module, name: str) -> Family:
    """Return the family of `model`.

    Args:
        model: a timm model, on any device.
        name: the model's name in the error message.

    Raises:
        ModelError: the model belongs to no family.
    """
    family = find_family(model)
    if family is not None:
        return family
    known = ", ".join(f"{family.name} ({family.model_type.__name__})" for family in FAMILIES)
    raise ModelError(
        f"{name} is a {type(model).__name__}, which cannot be compressed.",
        hint=f"Choose a model of one of these families, for example deit_small: {known}. To add a family, see "
        "docs/how-to/adding-a-family.md.",
    )


def family_named(name: str) -> Family:
    """Return the family that artifacts call `name`.

    Raises:
        ModelError: this version of vitcompress has no such family.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ModelError(f"Unknown model family {name!r}.", hint="Upgrade vitcompress: a newer version may have it.")
