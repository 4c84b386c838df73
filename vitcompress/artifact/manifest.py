"""What does a file say of itself, and which of it is believed?  Nothing that names code, a place or an absurd size.

    {format_version, source, plan, data_config, recipe, report, versions, classes, lineage, store, sha256}

`source` and `plan` say what is built, so each field of theirs has a type and a bound. The rest is text to be shown.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from timm.models import is_model, is_model_in_modules, split_model_name_tag
from timm.models._pretrained import PretrainedCfg  # not exported by timm

from vitcompress.artifact.tensorfile import first_fault, plain_json
from vitcompress.bundled import FASHION_VIT
from vitcompress.errors import ArtifactError
from vitcompress.plans.model import Plan
from vitcompress.quantize.codecs import STORES

FORMAT_VERSION = 2  # 1, which is still read, has no store: every tensor is as the model holds it

_MOST_BLOCKS = 512  # the deepest of timm's models has 60; each costs milliseconds to build, whatever its size
_MOST_NUMBER = 1 << 16  # of channels, pixels, tokens, ranks: sizes cost nothing to build on meta, loops over them do
_MOST_NUMBERS = {"num_classes": 1 << 20, "num_heads": 1 << 10}
_MOST_PARENTS = 1024
_MOST_DEPTH = 32  # of lists in lists
# a terminal obeys them or cannot print them, or XML has no place for them
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
MODULES = (  # of timm, in which there are models of our families
    "beit", "deit", "eva", "swin_transformer", "swin_transformer_v2", "vision_transformer", "vision_transformer_hybrid",
    "vitamin",
)  # fmt: skip
_CFG_KEYS = frozenset(field.name for field in dataclasses.fields(PretrainedCfg))


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        source: the teacher's name and the student's architecture and arguments.
        source_sha256: digest of the teacher's tensors; empty where the student has another head or image size since.
        plan: what is shared and added.
        data_config: timm's data config of the student; tuples where timm has them.
        recipe: the resolved recipe.
        report: the report, as `Report` writes it.
        versions: of the packages that made it.
        classes: names of the classes, in order; empty where they are not known.
        lineage: the files it was made from, oldest first, each with its `name`, `sha256` and `command`.
        store: how the tensors are held, a key of `STORES`.
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


def to_tree(manifest: Manifest) -> dict[str, Any]:
    """What the header says, as plain JSON values, without the digest."""
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    fields["plan"] = TypeAdapter(Plan).dump_python(manifest.plan, mode="json")
    tree: dict[str, Any] = _printable({"format_version": FORMAT_VERSION, **fields})
    return tree


def _printable(value: Any) -> Any:
    """The same with `?` where text holds what is none: escapes, and bytes of a command line that were no UTF-8."""
    if isinstance(value, str):
        return _CONTROL.sub("?", value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, (list, tuple)) else value


def from_text(path: Path, text: str) -> tuple[Manifest, dict[str, Any], str]:
    """Read a header.

    Args:
        path: of the artifact, for messages.
        text: JSON.

    Returns:
        The manifest, the tree that its digest was made of, and that digest.

    Raises:
        ArtifactError: of a newer format, or not what vitcompress writes.
    """
    try:
        tree = plain_json(text)
        _check_plain(tree)
        version = tree["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            raise ArtifactError(
                f"{path} is of format {version}; this vitcompress reads formats 1 to {FORMAT_VERSION}.",
                hint="pip install --upgrade vitcompress",
            )
        header = _Header.model_validate_json(text)
        _check_bounds(header)
    except KeyError as error:
        raise ArtifactError(f"{path}: its header has no {error}.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: its header cannot be understood: {first_fault(error)}.") from error
    digest = tree.pop("sha256")
    told = {key: value for key, value in tree.items() if key != "format_version"}
    lists = {name: tuple(told.get(name, ())) for name in ("classes", "lineage")}  # older files have neither
    config = header.data_config.model_dump(exclude={"crop_mode"} - header.data_config.model_fields_set)
    return Manifest(**{**told, **lists, "plan": header.plan, "data_config": config}), tree, digest


# --- what each field may be

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Pixels = Annotated[int, Field(ge=1, le=_MOST_NUMBER)]
_Text = Annotated[str, Field(max_length=4096)]
_Scalar = None | bool | int | float | Annotated[str, Field(max_length=64)]
_Row = Annotated[list[_Scalar], Field(max_length=64)]
_Argument = _Scalar | Annotated[list[_Scalar | _Row], Field(max_length=64)]


class _SourceFields(BaseModel):
    model_config = _STRICT

    name: Annotated[str, Field(pattern=r"^[^\n\t]+$", max_length=4096)]
    architecture: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,128}(\.[A-Za-z0-9_]{1,128})?$")]
    model_args: dict[str, _Argument]
    pretrained_cfg: dict[str, Any]


class _DataConfig(BaseModel):
    model_config = _STRICT

    input_size: tuple[_Pixels, _Pixels, _Pixels]
    mean: Annotated[tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], Field(max_length=_MOST_NUMBER)]
    std: Annotated[tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...], Field(max_length=_MOST_NUMBER)]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "bicubic"
    crop_pct: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    crop_mode: Literal["center", "squash", "border"] = "center"


class _Parent(BaseModel):
    model_config = _STRICT

    name: _Text
    sha256: _Text
    command: Annotated[str, Field(max_length=1 << 16)]


class _Header(BaseModel):
    model_config = _STRICT

    format_version: Annotated[int, Field(ge=1)]
    source: _SourceFields
    source_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    plan: Plan
    data_config: _DataConfig
    recipe: dict[str, Any]
    report: dict[str, Any]
    versions: dict[str, _Text]
    classes: tuple[_Text, ...] = ()
    lineage: Annotated[tuple[_Parent, ...], Field(max_length=_MOST_PARENTS)] = ()
    store: Literal[tuple(STORES)] = "source"  # type: ignore[valid-type]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _check_bounds(header: _Header) -> None:
    """Refuse what would take long, or much memory, merely to build without weights.

    Raises:
        ValueError: naming the first such number.
    """
    args, cfg, plan = header.source.model_args, header.source.pretrained_cfg, header.plan
    architecture = split_model_name_tag(header.source.architecture)[0]
    if not is_model_in_modules(architecture, MODULES):
        raise ValueError(f"{architecture} is no model of a family that is known here")
    name = header.source.name  # a teacher is looked for under it: of timm's, or with a colon, which is not followed
    if ":" not in name and name != FASHION_VIT.name and not is_model(split_model_name_tag(name)[0]):
        raise ValueError("its source is none of timm's models")
    blocks = sum(len(group.blocks) for group in plan.groups)
    _check_unique(plan)
    if not 1 <= blocks <= _MOST_BLOCKS:
        raise ValueError(f"its plan has {blocks} blocks, at most {_MOST_BLOCKS} are built")
    for name in ("depth", "depths"):
        depth = sum(_numbers(args.get(name)))
        if depth > blocks:
            raise ValueError(f"{name} is {_shown(depth)}, and its plan has {blocks} blocks")
    unknown = sorted(cfg.keys() - _CFG_KEYS)
    if unknown:
        raise ValueError(f"timm has no field {unknown[0][:80]} for what is known of weights")
    _check_channels(header.data_config)
    built = {name: cfg.get(name) for name in ("input_size", "num_classes")}  # the others build nothing
    sizes = {
        "token_kernel": plan.token_kernel,
        "ranks": [rank for group in plan.groups for rank in group.ranks.values()],
    }
    for name, value in [*args.items(), *built.items(), *sizes.items()]:
        most = _MOST_NUMBERS.get(name, _MOST_NUMBER)
        for number in _numbers(value):
            if not -most <= number <= most:
                raise ValueError(f"{name[:80]} is {_shown(number)}, at most {most:,} is believed")


def _check_unique(plan: Plan) -> None:
    """Refuse names that are there twice: each would be built once more, for every block.

    Raises:
        ValueError: naming the first such list.
    """
    lists = {"blocks": [block for group in plan.groups for block in group.blocks], "transforms": plan.transforms}
    for number, group in enumerate(plan.groups):
        lists |= {f"groups.{number}.shared": group.shared, f"groups.{number}.bases": group.bases}
    for where, names in lists.items():
        if len(set(names)) < len(names):
            raise ValueError(f"plan.{where} has a name twice")


def _check_channels(config: _DataConfig) -> None:
    """Refuse normalisation of other channels than the images have.

    Raises:
        ValueError: it is.
    """
    if {len(config.mean), len(config.std)} != {config.input_size[0]}:
        raise ValueError(f"mean and std are not of {config.input_size[0]} channels")


def _numbers(value: Any) -> list[float]:
    """All numbers in an argument."""
    if isinstance(value, (list, tuple)):
        return [number for each in value for number in _numbers(each)]
    return [value] if isinstance(value, (int, float)) else []


def _shown(number: float) -> str:
    return f"{number:,}" if abs(number) < 1e15 else "beyond all bounds"


def _check_plain(tree: Any) -> None:
    """Refuse what is nested deeply, and text that would do more than be shown.

    Raises:
        ValueError: it is.
    """
    level, depth = [tree], 0
    while level:
        if depth > _MOST_DEPTH:
            raise ValueError(f"nested deeper than {_MOST_DEPTH} levels")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if _CONTROL.search(value):
                    raise ValueError("text in it holds control characters")
            elif isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
        level, depth = below, depth + 1


__all__ = ["FORMAT_VERSION", "MODULES", "Manifest", "from_text", "to_tree"]
