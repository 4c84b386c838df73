"""Presets: what published code shares, adds and trains with, as defaults of a recipe, by family.

flags  >  recipe file  >  preset  >  the fields' own defaults
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitcompress.errors import RecipeError, nearest

Tree = Mapping[str, Mapping[str, Any]]

# MiniViT, arXiv:2204.07154, as in its released code, except where that would destroy the pretrained
# function: head mixes start as the identity instead of at N(0, 0.02), and Mini-Swin's norms on the
# residual trunk are left out.
_MINI_DEIT: Tree = {
    "plan": {"share_biases": True, "transforms": ("heads", "rpe")},
    "distill": {"loss": {"logits": 1.0}},
}
_MINI_SWIN: Tree = {
    "plan": {"share_biases": True, "share_tables": True, "transforms": ("heads", "mlp"), "token_kernel": 7},
    "distill": {"loss": {"logits": 1.0, "attention": 1.0, "hidden_relation": 0.1}},
}

PRESETS: Mapping[str, Mapping[str, Tree]] = {
    "minivit": {"vit": _MINI_DEIT, "swin": _MINI_SWIN, "swin_v2": _MINI_SWIN},
}
"""Defaults by preset and family, as stages and their fields."""


def check_preset(name: object) -> bool:
    """Return True if there is a preset of this name.

    Raises:
        RecipeError: no preset has this name; the message suggests the nearest one.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise RecipeError(
            f"--preset {name}: no such preset{nearest(str(name), PRESETS)}; there are {', '.join(PRESETS)}."
        )
    return True


def preset_defaults(name: str, family: str) -> Tree:
    """Return the defaults of a preset for a family.

    Args:
        name: name of an existing preset.
        family: name of the model's family.

    Raises:
        RecipeError: the preset is for other families.
    """
    if family not in PRESETS[name]:
        raise RecipeError(
            f"--preset {name} does not fit the {family} family: it is for {', '.join(PRESETS[name])}.",
            hint="Leave out --preset and choose what to share and add: --share-biases, --transforms heads,mlp.",
        )
    return PRESETS[name][family]


def fill(tree: Tree, defaults: Tree) -> dict[str, dict[str, Any]]:
    """Fill fields that `tree` does not set with those of `defaults`; fields are not merged."""
    return {stage: {**defaults.get(stage, {}), **tree.get(stage, {})} for stage in {**defaults, **tree}}
