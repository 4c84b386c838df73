"""Read the config and find the weights in a folder that transformers' `save_pretrained` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitcompress.errors import CheckpointError, ModelError
from vitcompress.pretrained.config_limits import check_transformers
from vitcompress.pretrained.transformers_config import TimmModel, is_transformers_config, to_timm_model


def is_transformers_folder(folder: Path) -> bool:
    """Return whether `folder` holds a config.json of transformers."""
    try:
        return is_transformers_config(_read_json(folder / "config.json"))
    except (OSError, ValueError, RecursionError):  # whatever reads it next reports what is wrong
        return False


def read_folder(folder: Path, *, headless: bool) -> tuple[TimmModel, Path]:
    """Return the timm model of a folder and the path of its weights.

    Args:
        folder: holds config.json, model.safetensors or pytorch_model.bin, and optionally
            preprocessor_config.json.
        headless: whether to leave out the classifier.

    Raises:
        ModelError: its config.json cannot be read, or timm has no such model.
        CheckpointError: it has no single file of weights.
    """
    preprocessor_path = folder / "preprocessor_config.json"
    try:
        config = _read_json(folder / "config.json")
        preprocessor = _read_json(preprocessor_path) if preprocessor_path.is_file() else None
        check_transformers(config, preprocessor or {})
        model = to_timm_model(config, preprocessor, headless=headless)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}", hint=error.hint) from error
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"{folder}: its config.json is incomplete or malformed: {repr(error)[:200]}.") from error
    paths = [path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).is_file()]
    if not paths:
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor pytorch_model.bin.",
            hint="If the weights are in several files, save them again with max_shard_size='100GB'.",
        )
    return model, paths[0]


def _read_json(path: Path) -> dict[str, Any]:
    tree = json.loads(path.read_text(encoding="utf-8"))
    return tree if isinstance(tree, dict) else {}
