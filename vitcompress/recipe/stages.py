"""The whole recipe: its stages in order, and the command-line flag of each field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from vitcompress.recipe.student import ModelRecipe, PlanRecipe, StartRecipe, StoreRecipe, TargetRecipe
from vitcompress.recipe.training import DataRecipe, DistillRecipe, RunRecipe, TeacherRecipe
from vitcompress.recipe.values import CONFIG, Bytes, flag_of, option


@dataclass(frozen=True, config=CONFIG)
class GateRecipe:
    """Requirements of the result; a missed one makes the command exit with code 3."""

    max_drop: float | None = option(None, "Largest allowed drop of top-1, in points.")
    min_ratio: float | None = option(None, "Minimum ratio of the source's parameters to the student's.", gt=0)
    max_size: Annotated[Annotated[int, Field(gt=0)] | None, Bytes] = option(
        None, "Largest allowed file size, like 40MB or 38MiB."
    )


@dataclass(frozen=True, config=CONFIG)
class Recipe:
    """Everything that decides the result, by stage."""

    model: ModelRecipe
    plan: PlanRecipe = dataclasses.field(default_factory=PlanRecipe)
    target: TargetRecipe = dataclasses.field(default_factory=TargetRecipe)
    start: StartRecipe = dataclasses.field(default_factory=StartRecipe)
    data: DataRecipe = dataclasses.field(default_factory=DataRecipe)
    teacher: TeacherRecipe = dataclasses.field(default_factory=TeacherRecipe)
    distill: DistillRecipe = dataclasses.field(default_factory=DistillRecipe)
    store: StoreRecipe = dataclasses.field(default_factory=StoreRecipe)
    run: RunRecipe = dataclasses.field(default_factory=RunRecipe)
    gates: GateRecipe = dataclasses.field(default_factory=GateRecipe)


STAGES: Mapping[str, Any] = get_type_hints(Recipe)


@dataclasses.dataclass(frozen=True)
class FlagSpec:
    """The command-line flag of a recipe's field.

    Attributes:
        stage: name of the stage.
        name: name of the field.
        cli_type: type that the command line collects; the recipe checks and converts the value.
        metavar: placeholder of the value in the help, like its choices; empty for the type's name.
        shown_default: the default as typed on the command line; empty if the help text says it.
        help: the help text.
    """

    stage: str
    name: str
    cli_type: Any
    metavar: str
    shown_default: str
    help: str


def flag_specs(*stages: str) -> Iterator[FlagSpec]:
    """Yield the flags of all fields of the named stages, in order of declaration."""
    for stage in stages:
        for name, field in STAGES[stage].__pydantic_fields__.items():
            metavar, default = _metavar(field.annotation), _shown_default(name, field)
            yield FlagSpec(stage, name, _cli_type(field), metavar, default, field.description)


def _cli_type(field: FieldInfo) -> Any:
    """Return the type that the command line collects; text if the recipe parses the field."""
    kinds = get_args(field.annotation)
    kind = next(k for k in kinds if k is not type(None)) if type(None) in kinds else field.annotation
    if get_origin(kind) is dict:
        return list[str]
    is_parsed = any(isinstance(parser, BeforeValidator) for parser in field.metadata)
    return kind if kind in (bool, int, float, Path) and not is_parsed else str


def _metavar(kind: Any) -> str:
    """Return the choices of a field, or the form of a pair; empty for other types."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is dict:
        return "KEY=VALUE"
    if get_origin(kind) is tuple:
        return _metavar(get_args(kind)[0]).replace("|", ",")
    choices = [_metavar(inner) for inner in get_args(kind) if inner is not type(None)]
    return "|".join(choice or "N" for choice in choices) if any(choices) else ""


def _shown_default(name: str, field: FieldInfo) -> str:
    default = field.default
    if default is True:
        return flag_of(name).replace("--no-", "--")
    if field.is_required() or default is None or default is False or default == {}:
        return ""
    if isinstance(default, float):
        return f"{default:g}"
    return ",".join(default) if isinstance(default, tuple) else str(default)
