"""Compose a recipe from several sources: the first source that sets a field wins.

flags  >  recipe file  >  preset  >  defaults of a built-in model  >  defaults of the fields
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
    fills_built_in: bool = True,
) -> Recipe:
    """Compose a recipe; flags win over the file, and the file wins over the preset.

    Args:
        flags: values by field name; each field name belongs to one stage.
        file: a YAML file of stages, each a mapping of fields, optionally with `preset: NAME` and
            `notes: …`; or the name of a built-in recipe, which takes precedence over a file of the
            same name.
        preset: name of a preset; wins over the file's.
        family_name: returns the name of a model's family; a preset needs it.
        fills_built_in: whether the built-in model has defaults of its own, which are for sharing.

    Raises:
        RecipeError: unknown keys or names, wrong values, contradictions, or a preset that does not
            fit the model; all faults at once.
    """
    faults = Faults()
    contents = faults.attempt(_read, file) if file else {}
    tree = _merge(flags, contents or {})
    file_preset = tree.pop("preset", None)
    preset = file_preset if preset is None else preset
    tree.pop("notes", None)
    preset_is_known = preset is not None and faults.attempt(check_preset, preset)
    model_is_named = "model" in tree.get("model", {})
    if not model_is_named:
        if contents is not None:
            faults.add("No model is named.", "Give a MODEL, or model: {model: …} in the recipe.")
        tree.setdefault("model", {})["model"] = ""  # so that the rest can be checked

    def complete(tree: Tree) -> Tree:
        return _fill_built_in(tree) if fills_built_in else tree

    recipe = faults.attempt(from_dict, complete(tree))
    model = recipe.model if recipe else _model_of(tree)
    if preset is not None and preset_is_known and model_is_named and model:
        defaults = faults.attempt(_defaults, preset, model, family_name)
        if recipe and defaults:
            recipe = faults.attempt(from_dict, complete(fill(tree, defaults)))
    faults.raise_as(RecipeError)
    assert recipe is not None  # otherwise there was a fault
    return recipe


def _model_of(tree: Tree) -> ModelRecipe | None:
    """Return the model stage of a recipe with faults elsewhere; None if it has faults itself."""
    try:
        return TypeAdapter(ModelRecipe).validate_python(tree["model"])
    except ValidationError:
        return None


def _defaults(preset: str, model: ModelRecipe, family_name: Callable[[ModelRecipe], str] | None) -> Tree:
    if family_name is None:
        raise RecipeError(f"--preset {preset}: the family of the model is needed, but not known.")
    return preset_defaults(preset, family_name(model))


def _fill_built_in(tree: Tree) -> Tree:
    """Fill unset fields with the built-in model's training defaults, if it is the model."""
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


def _merge(flags: Mapping[str, Any], contents: Mapping[str, Any]) -> dict[str, Any]:
    """Merge flags into the contents of a recipe file; flags win."""
    tree = {key: dict(fields) if isinstance(fields, dict) else fields for key, fields in contents.items()}
    stage_of = {spec.name: spec.stage for spec in flag_specs(*STAGES)}
    for name, value in flags.items():
        stage = tree.setdefault(stage_of[name], {})
        for rival in _RIVALS.get(name, ()):
            if rival not in flags:  # a flag also replaces fields of the file that exclude it
                stage.pop(rival, None)
        stage[name] = value
    return tree


_OTHER_KEYS = ("preset", "notes")  # of a recipe file, besides its stages
_RIVALS = {  # fields that exclude each other
    "share": ("groups",),
    "groups": ("share",),
    "steps": ("epochs", "max_minutes"),
    "epochs": ("steps", "max_minutes"),
    "max_minutes": ("steps", "epochs"),
}


def _read(file: Path) -> dict[str, Any]:
    """Read a recipe file and check that it holds stages."""
    name = str(file)
    try:
        tree = yaml.safe_load(recipe_text(name) if name in recipe_names() else file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(
            f"--recipe {file}: there is no file and no built-in recipe of this name{nearest(name, recipe_names())}.",
            hint="Run `vitcompress recipes` to list the built-in recipes.",
        ) from error
    except OSError as error:
        raise RecipeError(f"--recipe {file}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"--recipe {file} is not YAML: {error}.") from error
    if not isinstance(tree, dict) or not all(isinstance(tree.get(stage, {}), dict) for stage in STAGES):
        raise RecipeError(
            f"--recipe {file} must hold stages, each with its options.", hint="For example:  plan: {share: 4}"
        )
    return tree


def from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Make a recipe from plain values, as `to_dict` returns them.

    Raises:
        RecipeError: all faults at once; for an unknown key, the nearest valid one.
    """
    try:
        return TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        raise_faults(RecipeError, [(_fault(dict(item)), "") for item in error.errors()])
        raise


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON values, with all defaults."""
    tree: dict[str, Any] = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return tree


def _fault(item: dict[str, Any]) -> str:
    """Translate one of pydantic's errors into a line that names the flag."""
    path = [str(part) for part in item["loc"] if not str(part).startswith("function-")]
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return f"{message}." if message.startswith("--") else f"{_flag(path)}: {message}."
    if item["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(STAGES[path[0]])] if len(path) > 1 else [*STAGES, *_OTHER_KEYS]
        return f"{'.'.join(path)}: no such option{nearest(path[-1], known)}."
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{_flag(path)} {item['input']}: {message}."


def _flag(path: list[str]) -> str:
    return flag_of(path[1] if len(path) > 1 else path[0])
