"""Keep measured options in a file, so that several targets need one measurement.

The file is JSON: what was measured on what, and the cost of each option. Groups are not in it:
the options are listed anew from the model, and have to be the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

import vitcompress
from vitcompress.artifact.atomic import write_text
from vitcompress.artifact.tensorfile import first_fault, strict_json
from vitcompress.errors import ArtifactError, RecipeError, shorten
from vitcompress.plans.bounds import MAX_BLOCKS, Amount, Block, Count, Text
from vitcompress.recipe.differences import describe_differences
from vitcompress.search.measured import Level, MeasuredOptions
from vitcompress.search.options import Option, Shapes, list_options

FORMAT, VERSION = "vitcompress options", 1
MAX_BYTES = 1 << 30
_MAX_OPTIONS, _MAX_LEVELS = 1_000_000, 16
_MEASURE = "vitcompress plan MODEL --calibrate DIR --save FILE measures them."


@dataclass(frozen=True)
class SavedOption:
    """An option and its cost.

    Attributes:
        kind: as in `Option`; likewise `scale`, `dial` and `saved_params`.
        scale: the part and what is set in it.
        blocks: full names.
        dial: rank or width.
        saved_params: parameters that the part saves.
        nats: its cost at each level, nats per image.
    """

    kind: Text
    scale: Text
    blocks: Annotated[tuple[Block, ...], Field(min_length=1, max_length=MAX_BLOCKS)]
    dial: Count
    saved_params: int
    nats: Annotated[tuple[Amount, ...], Field(min_length=1, max_length=_MAX_LEVELS)]

    @property
    def key(self) -> tuple[Any, ...]:
        """What the option is recognized by."""
        return self.kind, self.scale, self.blocks, self.dial, self.saved_params


@dataclass(frozen=True)
class SavedLevel:
    """A context that costs were measured in; as `Level`, without the costs."""

    params: Annotated[int, Field(gt=0)]
    joint: Amount


@dataclass(frozen=True)
class SavedOptions:
    """The contents of an options file.

    Attributes:
        format: `FORMAT`.
        version: of this structure.
        vitcompress: version of the package that measured.
        facts: what was measured on what; names are flags, or words.
        kinds: kinds of options that were measured.
        levels: of the costs, the largest student first.
        options: all options.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: str
    version: int
    vitcompress: Text
    facts: Annotated[dict[Text, str | int | None], Field(max_length=64)]
    kinds: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)]
    levels: Annotated[tuple[SavedLevel, ...], Field(min_length=1, max_length=_MAX_LEVELS)]
    options: Annotated[tuple[SavedOption, ...], Field(max_length=_MAX_OPTIONS)]


_ADAPTER = TypeAdapter(SavedOptions)


def save_options(path: Path, measured: MeasuredOptions, facts: Mapping[str, str | int | None]) -> None:
    """Write options to a file, whole or not at all.

    Args:
        path: the file; replaced where it exists.
        measured: the options.
        facts: what has to be equal where they are used; JSON values by their flags or names.

    Raises:
        ArtifactError: the file cannot be written.
    """
    costs = zip(*(level.nats for level in measured.levels), strict=True)
    options = tuple(
        SavedOption(o.kind, o.scale, o.group.blocks, o.dial, o.saved_params, nats)
        for o, nats in zip(measured.options, costs, strict=True)
    )
    kinds = tuple(measured.shapes.kinds)
    levels = tuple(SavedLevel(level.params, level.joint) for level in measured.levels)
    saved = SavedOptions(FORMAT, VERSION, vitcompress.__version__, dict(facts), kinds, levels, options)
    write_text(path, json.dumps(_ADAPTER.dump_python(saved, mode="json")) + "\n")


def read_options(path: Path) -> SavedOptions:
    """Read an options file, and check its structure.

    Raises:
        ArtifactError: it is missing, cut short, or something else.
    """
    hint = f"It may be incomplete, or another file. {_MEASURE}"
    try:
        if not path.is_file():
            raise ArtifactError(
                f"--options {path} {'is not a file' if path.exists() else 'does not exist'}.", hint=_MEASURE
            )
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        tree = strict_json(path.read_bytes())
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise ValueError("it does not hold measured options")
        if tree.get("version") != VERSION:
            version = str(tree.get("version"))[:20]
            raise ArtifactError(
                f"--options {path} has version {version}; this vitcompress reads version {VERSION}.", hint=_MEASURE
            )
        return _ADAPTER.validate_python(tree)
    except (OSError, ValidationError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_fault(error)
        raise ArtifactError(f"--options {path} cannot be read: {reason}.", hint=hint) from error


def load_options(path: Path, shapes: Shapes, facts: Mapping[str, str | int | None]) -> MeasuredOptions:
    """Return the options of a file, of the kinds that are asked for.

    Args:
        path: a file that `save_options` wrote.
        shapes: the model, and the kinds to use.
        facts: of this model, these images and settings.

    Raises:
        ArtifactError: it cannot be read, or its options are not those of the model.
        RecipeError: it is of another model, other images or settings, or lacks a kind; names them.
    """
    saved = read_options(path)
    lines = describe_differences(saved.facts, facts)
    if missing := [kind for kind in shapes.kinds if kind not in saved.kinds]:
        lines.append(f"  --kinds: {shorten(missing)} not measured, only {shorten(saved.kinds)}")
    if lines:
        raise RecipeError(
            "\n".join((f"--options {path} was measured on something else.", *lines)),
            hint=f"Give the same model, images and settings, or measure again: {_MEASURE}",
        )
    nats = {option.key: option.nats for option in saved.options}
    listed = {_key(option) for option in list_options(replace(shapes, kinds=saved.kinds))}
    params = [level.params for level in saved.levels]
    is_whole = all(len(costs) == len(params) for costs in nats.values()) and params == sorted(set(params), reverse=True)
    if not listed >= nats.keys() or len(nats) != len(saved.options) or not nats or not is_whole:
        raise ArtifactError(
            f"--options {path}: its options are not those of the model.",
            hint=f"Another version of vitcompress may have measured them. Measure again: {_MEASURE}",
        )
    wanted = [option for option in list_options(shapes) if _key(option) in nats]  # not all fit in memory together
    costs = zip(*(nats[_key(option)] for option in wanted), strict=True)
    levels = [Level(level.params, list(each), level.joint) for level, each in zip(saved.levels, costs, strict=True)]
    return MeasuredOptions(shapes, wanted, levels)


def _key(option: Option) -> tuple[Any, ...]:
    return option.kind, option.scale, option.group.blocks, option.dial, option.saved_params
