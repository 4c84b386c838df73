"""How do flags, a file, a preset and a model's own defaults become one recipe?

flags  >  recipe file  >  preset  >  what a built-in model brings  >  the fields' own defaults
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from vitcompress.bundled import FASHION_VIT
from vitcompress.errors import Faults, RecipeError, nearest, raise_faults
from vitcompress.recipe import STAGES, ModelRecipe, Recipe, flag_specs
from vitcompress.recipe.presets import Tree, check_preset, fill, preset_defaults
from vitcompress.recipe.shipped import recipe_names, recipe_text
from vitcompress.recipe.values import flag_of


def build(
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    preset: str | None = None,
    family_name: Callable[[ModelRecipe], str] | None = None,
) -> Recipe:
    """Make a recipe from a preset, a file and flags; flags win over the file, and the file over the preset.

    Args:
        flags: values by field name; every field name belongs to one stage.
        file: a YAML file of stages, each a mapping of fields, and perhaps `preset: NAME` and `notes: …`; or the name
            of a recipe that comes with the package, which wins over a file of that name.
        preset: named here, it wins over the file's.
        family_name: tells the family of a model, which a preset's defaults depend on.

    Raises:
        RecipeError: unknown keys or names, wrong values, contradictions or a preset that does not fit the model, all
            of them at once.
    """
    faults = Faults()
    attempt = faults.attempt
    recipe: Recipe | None
    read = attempt(_read, file) if file else {}
    tree = _merge(flags, read or {})
    preset = preset if preset is not None else tree.pop("preset", None)
    tree.pop("preset", None), tree.pop("notes", None)
    known = preset is not None and attempt(check_preset, preset)
    named = "model" in tree.get("model", {})
    if not named:
        if read is not None:
            faults.add("No model is named.", "Give a MODEL, or model: {model: …} in the recipe.")
        tree.setdefault("model", {})["model"] = ""  # so that the rest can be checked
    recipe = attempt(from_dict, _over_built_in(tree))
    if known and named:
        model = recipe.model if recipe else attempt(TypeAdapter(ModelRecipe).validate_python, tree["model"])
        defaults = attempt(_defaults, preset, model, family_name)
        recipe = attempt(from_dict, _over_built_in(fill(tree, defaults))) if defaults and recipe else recipe
    faults.raise_as(RecipeError)
    assert recipe is not None  # else there was a fault
    return recipe


def _defaults(preset: str, model: ModelRecipe, family_name: Callable[[ModelRecipe], str] | None) -> Tree:
    if family_name is None:
        raise RecipeError(f"preset {preset}: the family of the model is needed to follow it.")
    return preset_defaults(preset, family_name(model))


def _over_built_in(tree: Tree) -> Tree:
    """The same over the training that a built-in model brings with it, where it is one."""
    if tree.get("model", {}).get("model") != FASHION_VIT.name:
        return tree
    defaults = {
        stage: {
            name: value
            for name, value in fields.items()
            if not any(rival in tree.get(stage, {}) for rival in _RIVALS.get(name, ()))
        }
        for stage, fields in FASHION_VIT.recipe.items()
    }
    return fill(tree, defaults)


def _merge(flags: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, with the flags over it."""
    tree = {key: dict(fields) if isinstance(fields, dict) else fields for key, fields in read.items()}
    home = {spec.name: spec.stage for spec in flag_specs(*STAGES)}
    for name, value in flags.items():
        stage = tree.setdefault(home[name], {})
        for rival in _RIVALS.get(name, ()):
            if rival not in flags:  # a flag also wins over the file's other way of saying the same thing
                stage.pop(rival, None)
        stage[name] = value
    return tree


_BESIDE_STAGES = ("preset", "notes")  # of a recipe file
_RIVALS = {
    "share": ("groups",),
    "groups": ("share",),
    "steps": ("epochs", "max_minutes"),
    "epochs": ("steps", "max_minutes"),
    "max_minutes": ("steps", "epochs"),
}


def _read(file: Path) -> dict[str, Any]:
    """Read and check the shape of a recipe file."""
    name = str(file)
    try:
        tree = yaml.safe_load(recipe_text(name) if name in recipe_names() else file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(
            f"--recipe {file}: {error.strerror}, and no such recipe comes with vitcompress"
            f"{nearest(name, recipe_names())}.",
            hint="vitcompress recipes lists those that do.",
        ) from error
    except OSError as error:
        raise RecipeError(f"--recipe {file}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"--recipe {file}: not YAML: {error}.") from error
    if not isinstance(tree, dict) or not all(isinstance(tree.get(stage, {}), dict) for stage in STAGES):
        raise RecipeError(
            f"--recipe {file}: must hold stages, each with its options.", hint="For example:  plan: {share: 4}"
        )
    return tree


def from_dict(tree: Mapping[str, Any]) -> Recipe:
    """The recipe that `to_dict` wrote.

    Raises:
        RecipeError: every fault at once, an unknown key with the nearest valid one.
    """
    try:
        return TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        raise_faults(RecipeError, [(_fault(dict(item)), "") for item in error.errors()])
        raise


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values, defaults written out."""
    tree: dict[str, Any] = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return tree


def _fault(item: dict[str, Any]) -> str:
    """One line for one of pydantic's errors, in the user's words."""
    path = [str(part) for part in item["loc"] if not str(part).startswith("function-")]
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return f"{message}." if message.startswith("--") else f"{_flag(path)}: {message}."
    if item["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(STAGES[path[0]])] if len(path) > 1 else [*STAGES, *_BESIDE_STAGES]
        return f"{'.'.join(path)}: no such option{nearest(path[-1], known)}."
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{_flag(path)} {item['input']}: {message}."


def _flag(path: list[str]) -> str:
    return flag_of(path[1] if len(path) > 1 else path[0])
