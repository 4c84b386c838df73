"""Which model does a name mean, and where do its weights come from?

fashion_vit          built in                     deit_base           short name, or unambiguous prefix
hf-hub:user/repo     the Hub's config.json        local-dir:folder    the same from a folder, or transformers'
"""

from __future__ import annotations

import difflib
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
from vitcompress.pretrained.transformers_folder import is_transformers_folder, read_folder
from vitcompress.pretrained.weights_file import check_folder
from vitcompress.recipe import ModelRecipe


@dataclass(frozen=True)
class Source:
    """Where a teacher comes from.

    Attributes:
        name: what it is called in reports.
        architecture: timm's registered name, with the pretrained tag where one was given.
        model_args: arguments for timm's constructor.
        pretrained_cfg: what the Hub, a folder or the bundle says of the weights; empty for timm's own models.
        checkpoint: a file with the weights; None where timm fetches them.
    """

    name: str
    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None


def resolve(recipe: ModelRecipe) -> Source:
    """Find out which model `recipe` names; reads no weights.

    Raises:
        ModelError: unknown or ambiguous, with the nearest names; or a config.json that cannot be followed.
        CheckpointError: the checkpoint is a folder of another model, or of none.
    """
    headless = recipe.model_arg.get("num_classes") == 0
    source = _named(recipe.model, headless=headless)
    if recipe.checkpoint is not None and recipe.checkpoint.is_dir():
        source = _in_folder(source, recipe.checkpoint, headless=headless)
    elif recipe.checkpoint is not None:
        source = replace(source, checkpoint=recipe.checkpoint)
    return replace(source, model_args={**source.model_args, **recipe.model_arg})


def _named(name: str, *, headless: bool) -> Source:
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
        return _from_config(name, identifier, load_model_config_from_hf)
    if kind == "local-dir":
        check_folder(Path(identifier))
        if is_transformers_folder(Path(identifier)):
            found, weights = read_folder(Path(identifier), headless=headless)
            return Source(name, found.architecture, found.model_args, found.pretrained_cfg, weights)
        return _from_config(name, identifier, load_model_config_from_path)
    architecture = _registered(identifier)
    return Source(architecture, architecture)


def _from_config(name: str, identifier: str, read: Any) -> Source:
    try:
        pretrained_cfg, architecture, model_args = read(identifier)
    except KeyError as error:
        raise ModelError(
            f"MODEL {name}: its config.json is none of timm's: it has no {error}.",
            hint="If transformers wrote it, fetch the whole folder and name that: local-dir:FOLDER.",
        ) from error
    except Exception as error:  # the Hub client raises dozens of types, of three libraries
        raise ModelError(
            f"MODEL {name}: its config.json cannot be read: {first_line(error).rstrip('.')}.",
            hint="Without a network, name the architecture and give its weights: MODEL --checkpoint FILE.",
        ) from error
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ModelError(f"MODEL {name}: its architecture {architecture!r} is not one of timm's.")
    try:
        check_timm(model_args, pretrained_cfg)
    except ModelError as error:
        raise ModelError(f"MODEL {name}: its config.json cannot be followed: {error}") from error
    return Source(name, architecture, dict(model_args), dict(pretrained_cfg))


def _in_folder(source: Source, folder: Path, *, headless: bool) -> Source:
    """The model of a folder given as weights for the model that `source` names, which must be of that construction."""
    check_folder(folder)
    if not is_transformers_folder(folder):
        raise CheckpointError(
            f"--checkpoint {folder} is a folder without a config.json of transformers.",
            hint=f"Name the file in it, or the folder as the model: local-dir:{folder}.",
        )
    found, weights = read_folder(folder, headless=headless)
    if not is_model_in_modules(split_model_name_tag(source.architecture)[0], found.modules):
        raise CheckpointError(
            f"--checkpoint {folder} holds a model like {found.architecture}; {source.name} is built differently.",
            hint=f"Let the folder say what it is: local-dir:{folder}.",
        )
    return Source(source.name, found.architecture, found.model_args, found.pretrained_cfg, weights)


def _registered(name: str) -> str:
    """Timm's name for what the user typed: exact, short, or an unambiguous prefix."""
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
                hint="timm.list_models() lists every name; hf-hub:USER/REPO and local-dir:FOLDER work too.",
            )
        base = matches[0]
    if not tag:
        return base
    tagged = f"{base}.{tag}"
    known = timm.list_pretrained(f"{base}.*")
    if tagged not in known:
        raise ModelError(f"MODEL {name}: no weights with the tag {tag!r}.", hint=f"There are: {shorten(known)}.")
    return tagged
