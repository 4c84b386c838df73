"""Recipes: what the user asks for, as one frozen dataclass per stage.

A field is declared once, here. Its default, bounds and help serve the Python API, the command-line
flag, the YAML key and the reference. `vitcompress.cli.app` makes the flags from these classes.
"""

from vitcompress.recipe.stages import STAGES, FlagSpec, GateRecipe, Recipe, flag_specs
from vitcompress.recipe.student import (
    DEFAULT_SHARE,
    KINDS,
    QUANTIZED_STORES,
    TRANSFORMS,
    ModelRecipe,
    PlanRecipe,
    StartRecipe,
    StoreRecipe,
    TargetRecipe,
)
from vitcompress.recipe.training import (
    BUILT_IN,
    DEFAULT_LR,
    DEFAULT_STEPS,
    LOSS_NAMES,
    DataRecipe,
    DistillRecipe,
    Interval,
    RunRecipe,
    TeacherRecipe,
    save_interval,
)
from vitcompress.recipe.values import flag_of

__all__ = [
    "BUILT_IN",
    "DEFAULT_LR",
    "DEFAULT_SHARE",
    "DEFAULT_STEPS",
    "KINDS",
    "LOSS_NAMES",
    "QUANTIZED_STORES",
    "STAGES",
    "TRANSFORMS",
    "DataRecipe",
    "DistillRecipe",
    "FlagSpec",
    "GateRecipe",
    "Interval",
    "ModelRecipe",
    "PlanRecipe",
    "Recipe",
    "RunRecipe",
    "StartRecipe",
    "StoreRecipe",
    "TargetRecipe",
    "TeacherRecipe",
    "flag_of",
    "flag_specs",
    "save_interval",
]
