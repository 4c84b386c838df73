"""Define the manifest that describes an artifact, and validate one that was read from a file.

    {format_version, source, plan, data_config, recipe, report, versions, classes, lineage, store,
    sha256}

A file may come from anybody. `source` and `plan` decide what is built, so each of their fields has
a type and a bound; no field names code to run or a path to open. The rest is text to show. What
only timm's registry knows (is there such an architecture?) is checked when a model is built, by
`vitcompress.artifact.load`: this module imports neither torch nor timm.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from vitcompress.artifact.tensorfile import first_fault, strict_json
from vitcompress.errors import ArtifactError
from vitcompress.plans.bounds import MAX_BLOCKS
from vitcompress.plans.model import Plan
from vitcompress.recipe.student import OutputName, StoreName

FORMAT_VERSION = 2  # version 1, which is still read, has no `store`: its tensors are as the model holds them

# channels, pixels, tokens, ranks: tensors on the meta device cost nothing whatever their size, but
# loops over them do
_MAX_NUMBER = 1 << 16
_MAX_NUMBERS = {"num_classes": 1 << 20, "num_heads": 1 << 10}
_MAX_PARENTS = 1024
_MAX_NESTING = 32
# characters that a terminal obeys or cannot print, or that XML does not allow
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Manifest:
    """Description of an artifact, stored in its header.

    Attributes:
        source: name of the source, and architecture, arguments and kind of outputs of the student;
            without a kind, the number of outputs decides.
        source_sha256: digest of the source's tensors; empty if the student's head or image size has
            changed since.
        plan: what is shared and added.
        data_config: timm's data config of the student; tuples where timm has them.
        recipe: the resolved recipe.
        report: the report, as JSON values of `Report`.
        versions: versions of the packages that wrote the file.
        classes: names of the classes, in order; empty if unknown.
        lineage: files that this one was made from, oldest first, each with `name`, `sha256` and
            `command`.
        store: number format of the stored tensors, a key of `STORES`.
    """

    source: Mapping[str, Any]
    source_sha256: str
    plan: Plan
    data_config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    versions: Mapping[str, str]
    classes: tuple[str, ...] = ()
    lineage: tuple[Mapping[str, str], ...] = ()
    store: str = "source"


@dataclass(frozen=True)
class Header:
    """Header of an artifact, as read.

    Attributes:
        manifest: the validated manifest.
        tree: the JSON that the digest covers.
        sha256: digest of `tree` and all tensors, as the header gives it.
    """

    manifest: Manifest
    tree: Mapping[str, Any]
    sha256: str


def to_tree(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as plain JSON values, without the digest."""
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    fields["plan"] = TypeAdapter(Plan).dump_python(manifest.plan, mode="json")
    tree: dict[str, Any] = _printable({"format_version": FORMAT_VERSION, **fields})
    return tree


def _printable(value: Any) -> Any:
    """Replace unprintable characters, such as escapes and bytes that are not UTF-8, by `?`."""
    if isinstance(value, str):
        return _CONTROL.sub("?", value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, (list, tuple)) else value


def parse_header(path: Path, text: str) -> Header:
    """Parse and validate the JSON in an artifact's header.

    Args:
        path: path of the artifact, for messages.
        text: the JSON.

    Raises:
        ArtifactError: the format is newer than this package, or the text is not what vitcompress
            writes.
    """
    try:
        tree = strict_json(text)
        _check_text(tree)
        version = tree["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format {version}; this vitcompress reads formats 1 to {FORMAT_VERSION}.",
                hint="pip install --upgrade vitcompress",
            )
        fields = _Fields.model_validate_json(text)
        _check_bounds(fields)
    except KeyError as error:
        raise ArtifactError(f"{path}: its header has no {error}.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: its header is not valid: {first_fault(error)}.") from error
    sha256 = tree.pop("sha256")
    config = fields.data_config.model_dump(exclude={"crop_mode"} - fields.data_config.model_fields_set)
    values = {key: value for key, value in tree.items() if key != "format_version"}
    values |= {name: tuple(tree.get(name, ())) for name in ("classes", "lineage")}  # older files have neither
    return Header(Manifest(**{**values, "plan": fields.plan, "data_config": config}), tree, sha256)


# --- types and bounds of each field

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Pixels = Annotated[int, Field(ge=1, le=_MAX_NUMBER)]
_Text = Annotated[str, Field(max_length=4096)]
_Scalar = None | bool | int | float | Annotated[str, Field(max_length=64)]
_Row = Annotated[list[_Scalar], Field(max_length=64)]
_Argument = _Scalar | Annotated[list[_Scalar | _Row], Field(max_length=64)]


class _Source(BaseModel):
    model_config = _STRICT

    name: Annotated[str, Field(pattern=r"^[^\n\t]+$", max_length=4096)]
    architecture: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,128}(\.[A-Za-z0-9_]{1,128})?$")]
    model_args: dict[str, _Argument]
    pretrained_cfg: dict[str, Any]
    outputs: OutputName | None = None


class _DataConfig(BaseModel):
    model_config = _STRICT

    input_size: tuple[_Pixels, _Pixels, _Pixels]
    mean: Annotated[tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], Field(max_length=_MAX_NUMBER)]
    std: Annotated[tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...], Field(max_length=_MAX_NUMBER)]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "bicubic"
    crop_pct: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    crop_mode: Literal["center", "squash", "border"] = "center"


class _Parent(BaseModel):
    model_config = _STRICT

    name: _Text
    sha256: _Text
    command: Annotated[str, Field(max_length=1 << 16)]


class _Fields(BaseModel):
    """All fields of a header."""

    model_config = _STRICT

    format_version: Annotated[int, Field(ge=1)]
    source: _Source
    source_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    plan: Plan
    data_config: _DataConfig
    recipe: dict[str, Any]
    report: dict[str, Any]
    versions: dict[str, _Text]
    classes: tuple[_Text, ...] = ()
    lineage: Annotated[tuple[_Parent, ...], Field(max_length=_MAX_PARENTS)] = ()
    store: StoreName = "source"
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _check_bounds(fields: _Fields) -> None:
    """Refuse what would take long, or much memory, merely to build without weights.

    Raises:
        ValueError: naming the first such number.
    """
    args, cfg, plan = fields.source.model_args, fields.source.pretrained_cfg, fields.plan
    num_blocks = sum(len(group.blocks) for group in plan.groups)
    _check_unique(plan)
    if not 1 <= num_blocks <= MAX_BLOCKS:
        raise ValueError(f"its plan has {num_blocks} blocks; the limit is {MAX_BLOCKS}")
    for name in ("depth", "depths"):
        depth = sum(_numbers_in(args.get(name)))
        if depth > num_blocks:
            raise ValueError(f"{name} is {_shown(depth)}, but its plan has {num_blocks} blocks")
    config = fields.data_config
    if {len(config.mean), len(config.std)} != {config.input_size[0]}:
        raise ValueError(f"mean and std do not have {config.input_size[0]} channels")
    built = {name: cfg.get(name) for name in ("input_size", "num_classes")}  # no other field of it is used to build
    sizes = {
        "token_kernel": plan.token_kernel,
        "ranks": [rank for group in plan.groups for rank in group.ranks.values()],
    }
    for name, value in [*args.items(), *built.items(), *sizes.items()]:
        limit = _MAX_NUMBERS.get(name, _MAX_NUMBER)
        for number in _numbers_in(value):
            if not -limit <= number <= limit:
                raise ValueError(f"{name[:80]} is {_shown(number)}; the limit is {limit:,}")


def _check_unique(plan: Plan) -> None:
    """Refuse duplicate names: each would be built again, in every block.

    Raises:
        ValueError: naming the first list with a duplicate.
    """
    lists = {"blocks": [block for group in plan.groups for block in group.blocks], "transforms": plan.transforms}
    for number, group in enumerate(plan.groups):
        lists |= {f"groups.{number}.{name}": getattr(group, name) for name in ("shared", "bases", "skipped")}
    for field, names in lists.items():
        if len(set(names)) < len(names):
            raise ValueError(f"plan.{field} has a name twice")


def _numbers_in(value: Any) -> list[float]:
    """Return all numbers in an argument, however nested."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers_in(item)]
    return [value] if isinstance(value, (int, float)) else []


def _shown(number: float) -> str:
    return f"{number:,}" if abs(number) < 1e15 else "far out of range"


def _check_text(tree: Any) -> None:
    """Refuse deep nesting and text with control characters.

    Raises:
        ValueError: there is some.
    """
    level, depth = [tree], 0
    while level:
        if depth > _MAX_NESTING:
            raise ValueError(f"nested deeper than {_MAX_NESTING} levels")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if _CONTROL.search(value):
                    raise ValueError("its text has control characters")
            elif isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
        level, depth = below, depth + 1
