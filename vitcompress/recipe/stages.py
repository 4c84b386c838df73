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
from vitcompress.recipe.values import CONFIG, Bytes, flag_of


@dataclass(frozen=True, config=CONFIG)
class GateRecipe:
    """Requirements of the result; a missed one makes the command exit with code 3."""

    max_drop: Annotated[float | None, Field(description="Largest allowed drop of top-1, in points.")] = None
    min_ratio: Annotated[
        float | None, Field(gt=0, description="Smallest allowed ratio of parameters, source to student.")
    ] = None
    max_size: Annotated[
        Annotated[int, Field(gt=0)] | None,
        Bytes,
        Field(description="Largest allowed file size, like 40MB or 38MiB."),
    ] = None


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
        metavar: what stands for the value in the help, like the choices; empty for the type's name.
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
    """Flags of all fields of the named stages, in order of declaration."""
    for stage in stages:
        hints = get_type_hints(STAGES[stage], include_extras=True)
        for field in dataclasses.fields(STAGES[stage]):
            kind, *metadata = get_args(hints[field.name])
            help_text = next(m.description for m in metadata if getattr(m, "description", None))
            parsed = any(isinstance(m, BeforeValidator) for m in metadata)
            cli_type = _cli_type(kind, parsed=parsed)
            yield FlagSpec(stage, field.name, cli_type, _metavar(kind), _shown_default(field), help_text)


def _cli_type(kind: Any, *, parsed: bool) -> Any:
    """Return the type that the command line collects; text if the recipe parses the field."""
    plain = next((k for k in get_args(kind) if k is not type(None)), kind) if type(None) in get_args(kind) else kind
    if get_origin(plain) is dict:
        return list[str]
    return plain if plain in (bool, int, float, Path) and not parsed else str


def _metavar(kind: Any) -> str:
    """Return the choices of a field, or the form of a pair; empty for other types."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is dict or any(get_origin(inner) is dict for inner in get_args(kind)):
        return "KEY=VALUE"
    separator = "," if get_origin(kind) is tuple else "|"
    choices = [_metavar(inner) for inner in get_args(kind)]
    return next((choice.replace("|", separator) for choice in choices if choice), "")


def _shown_default(field: Any) -> str:
    default = field.default_factory() if callable(field.default_factory) else field.default
    if default is True:
        return flag_of(field.name).replace("--no-", "--")
    if default in (None, False, {}) or default is dataclasses.MISSING or isinstance(default, FieldInfo):
        return ""
    if isinstance(default, dict):
        return " ".join(f"{key}={value:g}" for key, value in default.items())
    return ",".join(default) if isinstance(default, tuple) else str(default)
