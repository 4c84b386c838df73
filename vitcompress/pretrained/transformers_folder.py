"""What is in a folder that transformers' `save_pretrained` wrote?  Its config, read for timm, and its weights' file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitcompress.errors import CheckpointError, ModelError
from vitcompress.pretrained.config_limits import check_transformers
from vitcompress.pretrained.transformers_config import TimmModel, is_transformers_config, to_timm_model


def is_transformers_folder(folder: Path) -> bool:
    """Whether `folder` holds a config.json of transformers."""
    try:
        return is_transformers_config(_json(folder / "config.json"))
    except (OSError, ValueError, RecursionError):  # whoever reads it next says what is wrong
        return False


def read_folder(folder: Path, *, headless: bool) -> tuple[TimmModel, Path]:
    """The timm model of a folder, and the file with its weights.

    Args:
        folder: holds config.json and model.safetensors or pytorch_model.bin; preprocessor_config.json if at hand.
        headless: leave the classifier out.

    Raises:
        ModelError: its config.json cannot be understood, or timm has no such model.
        CheckpointError: no weights in one file.
    """
    preprocessor = folder / "preprocessor_config.json"
    try:
        config, images = _json(folder / "config.json"), _json(preprocessor) if preprocessor.is_file() else None
        check_transformers(config, images or {})
        model = to_timm_model(config, images, headless=headless)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}", hint=error.hint) from error
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = repr(error)[:200]
        raise ModelError(f"{folder}: its config.json does not say what is needed: {reason}.") from error
    files = [path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).is_file()]
    if not files:
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor pytorch_model.bin.",
            hint="Weights in several files: save them again with max_shard_size='100GB'.",
        )
    return model, files[0]


def _json(path: Path) -> dict[str, Any]:
    tree = json.loads(path.read_text(encoding="utf-8"))
    return tree if isinstance(tree, dict) else {}
