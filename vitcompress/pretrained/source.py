"""Which model does a name mean, and where do its weights come from?

fashion_vit          built in                     deit_base           short name, or unambiguous prefix
hf-hub:user/repo     the Hub's config.json        local-dir:folder    the same from a folder, or transformers'
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from timm.models import build_model_with_cfg, is_model_in_modules, parse_model_name, split_model_name_tag
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path  # not exported by timm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitcompress.bundled import FASHION_VIT
from vitcompress.errors import CheckpointError, ModelError, first_line, shorten
from vitcompress.families.find import family_of
from vitcompress.pretrained.limits import check_timm
from vitcompress.pretrained.short_names import SHORT_NAMES
from vitcompress.pretrained.transformers_folder import is_transformers_folder, read_folder
from vitcompress.pretrained.transformers_names import has_transformers_names, to_timm_weights
from vitcompress.pretrained.weightfiles import check_folder, read_weights, unreadable
from vitcompress.recipe import ModelRecipe

# what timm takes for itself, before the model's constructor: leave to read files or the network, or to build another
_NOT_FOR_CONSTRUCTOR = frozenset(
    {"device", "dtype", "features_only", "feature_cls", "model_name", "out_indices", "pruned", "use_naflex", "variant"}
    | inspect.signature(timm.create_model).parameters.keys()
    | inspect.signature(build_model_with_cfg).parameters.keys()
) - {"kwargs"}
_PLACES = frozenset({"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"})

_FEW_NUMBERS = 1 << 28  # a gigabyte, so that smaller models are told tensor by tensor what does not fit


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


def empty_model(source: Source) -> nn.Module:
    """Build the model of `source` on the meta device, its buffers too; reads no weights.

    Raises:
        ModelError: timm cannot build it with these arguments.
    """
    with torch.device("meta"), _Unfilled():
        return build_model(source)


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills tensors that have no numbers: three quarters of the time it takes to build a model."""

    _FILLS = frozenset(
        getattr(Tensor, name)
        for name in ("add_", "clamp_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_model(source: Source) -> nn.Module:
    """Build the model of `source` with the weights it starts from at random.

    Raises:
        ModelError: timm cannot build it with these arguments.
    """
    return _create(source.architecture, source.model_args, source.pretrained_cfg)


def _create(architecture: str, model_args: Mapping[str, Any], cfg: Mapping[str, Any]) -> nn.Module:
    known = {k: v for k, v in cfg.items() if k not in _PLACES}
    name, _ = split_model_name_tag(architecture)
    if not timm.is_model(name):
        raise ModelError(f"{architecture!r} is not one of timm's architectures.")
    reserved = sorted(_NOT_FOR_CONSTRUCTOR & model_args.keys())
    if reserved:
        message = f"--model-arg {shorten(reserved)}: is for timm itself, and not for the model's constructor."
        raise ModelError(message, hint="Leave it out.")
    arguments = dict(model_args)
    norm_eps = arguments.pop("norm_eps", None)  # ours, for checkpoints made with another: timm's constructors have none
    try:
        model: nn.Module = timm.create_model(
            name if known else architecture, pretrained=False, pretrained_cfg=known or None, **arguments
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, IndexError, ZeroDivisionError) as error:
        given = " ".join(f"{key}={value}" for key, value in model_args.items())
        raise ModelError(
            f"timm cannot build {architecture} with {given or 'its defaults'}: {first_line(error).rstrip('.')}.",
            hint="Check --model-arg against the model's constructor in timm.",
        ) from error
    for norm in model.modules() if norm_eps is not None else ():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = float(norm_eps)
    return model


def load_teacher(source: Source) -> nn.Module:
    """Build the model of `source` with its weights, on CPU, in eval mode.

    Raises:
        ModelError: timm cannot build it.
        CheckpointError: the weights are missing, unreadable, not finite or of another model; every wrong key at once.
    """
    if source.checkpoint is not None:
        _check_holds(source.checkpoint, source)
        model = build_model(source)
        _fill_from_checkpoint(model, source.checkpoint)
    else:
        model = _fetch(source)
    broken = [name for name, t in model.state_dict().items() if not bool(torch.isfinite(t.float()).all())]
    if broken:
        raise CheckpointError(
            f"The weights of {source.checkpoint or source.name} are not finite: {shorten(broken, limit=3)}.",
            hint="The run that made them blew up: take an earlier checkpoint of it.",
        )
    return model.float().eval()


def _check_holds(checkpoint: Path, source: Source) -> None:
    """Refuse a file that is too small for the model, before there is memory for the model's weights.

    Raises:
        CheckpointError: it is.
    """
    if not checkpoint.is_file():
        return  # reading it says what is wrong
    numbers = sum(t.numel() for t in empty_model(source).state_dict().values())
    if numbers > 4 * checkpoint.stat().st_size + _FEW_NUMBERS:  # each takes a byte at least; some may be tied
        raise CheckpointError(
            f"--checkpoint {checkpoint} does not fit the model: it has {checkpoint.stat().st_size:,} bytes, and "
            f"{source.name} {numbers:,} numbers.",
            hint="Give the model the weights were made for, or its sizes with --model-arg key=value.",
        )


def _fetch(source: Source) -> nn.Module:
    """Let timm find the weights: its cache, the Hub or a folder."""
    remote = source.name.partition(":")[0] in ("hf-hub", "local-dir")
    _check_head(source)
    name = source.name if remote else source.architecture
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **source.model_args)
    except Exception as error:  # the Hub client raises dozens of types, of three libraries
        if source.name.startswith("local-dir:"):
            raise unreadable(f"MODEL {source.name}", error) from error
        raise CheckpointError(
            f"No weights for {source.name}: {first_line(error).rstrip('.')}.",
            hint="Without a network, give a local file: --checkpoint FILE.",
        ) from error
    return model


def _check_head(source: Source) -> None:
    """Refuse another number of classes than the weights have: timm would start that head at random."""
    wanted = source.model_args.get("num_classes")
    stored = source.pretrained_cfg.get("num_classes") or timm.models.get_pretrained_cfg_value(
        source.architecture, "num_classes"
    )
    if wanted and stored and wanted != stored:
        raise CheckpointError(
            f"--model-arg num_classes={wanted}: the weights of {source.name} have {stored} classes, so the head "
            "would be random.",
            hint="Train the head first and give the result with --checkpoint.",
        )


def _fill_from_checkpoint(model: nn.Module, path: Path) -> None:
    """Load `path` into `model`, in place; names of transformers and other publishers are translated."""
    weights = read_weights(path)
    if has_transformers_names(weights):
        weights = to_timm_weights(weights, headless=getattr(model, "num_classes", None) == 0)
    faults = _mismatches(model, weights)
    if faults:
        try:
            converted = family_of(model, path.name).convert(dict(weights), model)
        except Exception:  # a translation that fails is none: the names as they stand are what to report
            converted = {}
        if not converted or _mismatches(model, converted):
            raise CheckpointError(
                f"--checkpoint {path} does not fit the model:\n" + "\n".join(f"  {fault}" for fault in faults),
                hint=f"{_widths(model, weights)}Give the model the weights were made for, or its sizes with "
                "--model-arg key=value.",
            )
        weights = converted
    model.load_state_dict(weights)


def _mismatches(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """The names and shapes by which `weights` differs from what `model` holds: of each kind the first and the last."""
    expected = model.state_dict()
    missing = [f"missing: {name} {tuple(t.shape)}" for name, t in expected.items() if name not in weights]
    unexpected = [f"unexpected: {name} {tuple(t.shape)}" for name, t in weights.items() if name not in expected]
    shapes = [
        f"shape: {name} is {tuple(t.shape)}, the model has {tuple(expected[name].shape)}"
        for name, t in weights.items()
        if name in expected and t.shape != expected[name].shape
    ]
    return [line for kind in (missing, unexpected, shapes) for line in _ends(kind)]


def _ends(faults: list[str]) -> list[str]:
    """The first and the last, and a count of what is between."""
    more = len(faults) - 2
    return faults if more <= 0 else [f"{faults[0]} … ({more} more)", faults[-1]]


def _widths(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """How wide the weights and the model are, by the first norm that both have; empty where that is the same."""
    for name, t in model.state_dict().items():
        if name.endswith(("norm1.weight", "norm.weight")) and name in weights and t.shape != weights[name].shape:
            return f"The weights are {weights[name].numel()} wide, the model {t.numel()}. "
    return ""
