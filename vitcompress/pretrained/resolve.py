"""Resolve a model's name to an architecture and a place of its weights; reads no weights.

fashion_vit         built in
deit_base           timm's name, a short name, or an unambiguous prefix
hf-hub:USER/REPO    timm's config.json on the Hub
local-dir:FOLDER    config.json of timm or transformers in a folder
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import timm.data
from timm.models import is_model_in_modules, parse_model_name, split_model_name_tag
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path  # not exported by timm

from vitcompress.bundled import FASHION_VIT
from vitcompress.errors import CheckpointError, ModelError, first_line, shorten
from vitcompress.pretrained.config_limits import check_timm
from vitcompress.pretrained.short_names import SHORT_NAMES
from vitcompress.pretrained.transformers_config import TimmModel, is_transformers_folder, read_folder
from vitcompress.pretrained.weights_file import WEIGHT_FILES, check_folder, folder_files, weights_in
from vitcompress.recipe import ModelRecipe
from vitcompress.runtime.caches import cache_hint

_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt")  # of weights in a folder


@dataclass(frozen=True)
class Source:
    """A pretrained model's architecture and the place of its weights.

    Attributes:
        name: name in reports.
        architecture: timm's registered name, with the pretrained tag if one was given.
        model_args: arguments for the model's constructor.
        pretrained_cfg: timm's data config and label names from the Hub, a folder or the bundle;
            empty for timm's own models.
        checkpoint: file of the weights; None if timm fetches them.
        notes: what a user should know about the preprocessing.
        checkpoint_key: key of the weights in that file; None to find them.
        outputs: name of the kind of the outputs, where it is told; None lets their number decide.
        artifact: file of vitcompress that holds the weights; None where another place does.
    """

    name: str
    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    checkpoint_key: str | None = None
    outputs: str | None = None
    artifact: Path | None = None


def resolve(recipe: ModelRecipe) -> Source:
    """Return the model that `recipe` names; reads no weights.

    Raises:
        ModelError: the name is unknown or ambiguous, or the model's config.json is unusable.
        CheckpointError: the checkpoint is a folder that does not hold this model.
    """
    headless = recipe.model_arg.get("num_classes") == 0
    source = _resolve_name(recipe.model, headless=headless)
    if recipe.checkpoint is not None and recipe.checkpoint.is_dir():
        source = _use_folder(source, recipe.checkpoint, headless=headless)
    elif recipe.checkpoint is not None:
        source = replace(source, checkpoint=recipe.checkpoint)
    model_args = {**source.model_args, **recipe.model_arg}
    outputs = recipe.outputs or source.outputs
    return replace(source, model_args=model_args, checkpoint_key=recipe.checkpoint_key, outputs=outputs)


def _resolve_name(name: str, *, headless: bool) -> Source:
    """Return the model that a name alone stands for; `headless` leaves out the classifier."""
    if name == FASHION_VIT.name:
        return Source(
            name, FASHION_VIT.architecture, dict(FASHION_VIT.model_args), dict(FASHION_VIT.pretrained_cfg),
            FASHION_VIT.checkpoint,
        )  # fmt: skip
    try:
        kind, identifier = parse_model_name(name)
    except ValueError as error:
        raise ModelError(f"MODEL {name}: {error}") from error
    if kind == "hf-hub":
        return _read_timm_config(name, identifier, load_model_config_from_hf)
    if kind == "local-dir":
        check_folder(Path(identifier))
        if is_transformers_folder(Path(identifier)):
            model, weights_path = read_folder(Path(identifier), headless=headless)
            return _translated(name, model, weights_path)
        source = _read_timm_config(name, identifier, load_model_config_from_path)
        return replace(source, checkpoint=_weights_of(Path(identifier), f"MODEL {name}", optional=True))
    architecture = _find_architecture(identifier)
    return Source(architecture, architecture)


def _read_timm_config(
    name: str, identifier: str, read_config: Callable[[str], tuple[dict[str, Any], Any, Any]]
) -> Source:
    """Return the model of a config.json of timm; `identifier` is `name` without its scheme.

    Raises:
        ModelError: the config.json cannot be read or is unusable.
    """
    try:
        pretrained_cfg, architecture, model_args = read_config(identifier)
    except KeyError as error:
        raise ModelError(
            f"MODEL {name}: its config.json is not one of timm's: it has no {error}.",
            hint="If transformers wrote it, download the whole folder and use local-dir:FOLDER.",
        ) from error
    except Exception as error:  # the Hub client raises dozens of types from three libraries
        raise ModelError(
            f"MODEL {name}: its config.json cannot be read: {first_line(error).rstrip('.')}.",
            hint=cache_hint(error)
            or "Without a network, give an architecture and a file of weights: MODEL --checkpoint FILE.",
        ) from error
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ModelError(f"MODEL {name}: its architecture {architecture!r} is not one of timm's.")
    try:
        check_timm(model_args, pretrained_cfg)
    except ModelError as error:
        raise ModelError(f"MODEL {name}: its config.json is unusable: {error}") from error
    return Source(name, architecture, dict(model_args), dict(pretrained_cfg))


def _translated(name: str, model: TimmModel, weights_path: Path) -> Source:
    """Return the source called `name` of a folder of transformers."""
    fields = (model.architecture, model.model_args, model.pretrained_cfg, weights_path)
    return Source(name, *fields, notes=model.notes, outputs=model.outputs)


def _use_folder(source: Source, folder: Path, *, headless: bool) -> Source:
    """Return the model of a folder that is given as the checkpoint of `source`.

    Raises:
        ModelError: the folder's config.json is unusable.
        CheckpointError: the folder holds no weights, or a model unlike `source`.
    """
    check_folder(folder)
    if not is_transformers_folder(folder):
        return replace(source, checkpoint=_weights_of(folder, f"--checkpoint {folder}"))
    model, weights_path = read_folder(folder, headless=headless)
    if not is_model_in_modules(split_model_name_tag(source.architecture)[0], model.modules):
        raise CheckpointError(
            f"--checkpoint {folder} holds a model like {model.architecture}; {source.name} is built differently.",
            hint=f"Name the folder as the model instead: local-dir:{folder}.",
        )
    return _translated(source.name, model, weights_path)


def _weights_of(folder: Path, what: str, *, optional: bool = False) -> Path:
    """Return the only file of weights in a folder, or the index of its shards.

    Args:
        folder: the folder; files with the Hub's usual names come first.
        what: the flag and the folder, at the start of messages.
        optional: return the usual path where there are none; a plan needs no weights.

    Raises:
        CheckpointError: it has none, or several.
    """
    usual = weights_in(folder)
    if usual is not None:
        return usual
    paths = [path for path in folder_files(folder) if path.name.endswith(_SUFFIXES)]
    if optional and not paths:
        return folder / WEIGHT_FILES[0]
    if len(paths) != 1:
        names = f"several: {shorten(path.name for path in paths)}" if paths else "none"
        raise CheckpointError(
            f"{what} should hold one file of weights and has {names}.", hint="Give the file: --checkpoint FILE."
        )
    return paths[0]


def _find_architecture(name: str) -> str:
    """Return timm's name for an exact name, a short name or an unambiguous prefix.

    Raises:
        ModelError: the name is unknown or ambiguous, or timm has no weights with its tag.
    """
    base: str
    base, tag = split_model_name_tag(name)
    base = SHORT_NAMES.get(base, base)
    if not timm.is_model(base):
        matches = sorted(timm.list_models(f"{base}*")) if base else []
        if len(matches) > 1:
            raise ModelError(f"MODEL {name} could be any of: {shorten(matches)}.", hint="Type more of the name.")
        if not matches:
            names = [FASHION_VIT.name, *SHORT_NAMES, *timm.list_models()]
            nearest = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
            raise ModelError(
                f"MODEL {name} is unknown." + (f" Nearest: {', '.join(nearest)}." if nearest else ""),
                hint="Give a name from timm.list_models(), hf-hub:USER/REPO or local-dir:FOLDER.",
            )
        base = matches[0]
    if not tag:
        return base
    tagged_name = f"{base}.{tag}"
    tagged_names = timm.list_pretrained(f"{base}.*")
    if tagged_name not in tagged_names:
        raise ModelError(
            f"MODEL {name}: timm has no weights with the tag {tag!r}.", hint=f"Choose one of: {shorten(tagged_names)}."
        )
    return tagged_name
