"""Where does an artifact lie?  In a file, in a folder that `export --to hf` wrote, or on the Hugging Face Hub.

mini.safetensors      a file
folder/               holds model.safetensors
hf-hub:USER/REPO      the same on the Hub; hf-hub:USER/REPO@REVISION for a branch, a tag or a commit
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from vitcompress.artifact import file as artifact
from vitcompress.errors import ArtifactError, first_line

WEIGHTS = "model.safetensors"
PREFIX = "hf-hub:"


def load(path: str | os.PathLike[str], *, keep_quantized: bool = False) -> nn.Module:
    """Load a compressed model: an `nn.Module` in eval mode on CPU, its parameters truly shared.

    A file or a folder needs no network; no teacher and no further argument is needed. No code is ever run from what is
    read. `pretrained_cfg` of the model is timm's data config.

    Args:
        path: a file that `vitcompress compress` wrote, a folder that `vitcompress export --to hf` wrote, or
            `hf-hub:USER/REPO`.
        keep_quantized: keep int8 and int4 matrices so in memory, each decoded when its layer runs: the same outputs
            from less memory, to run and not to train. By default, and where there are none, all numbers are floating.

    Raises:
        ArtifactError: missing, cut short, altered, of a newer format, or not an artifact.
    """
    return artifact.load(locate(path), keep_quantized=keep_quantized)


def locate(path: str | os.PathLike[str]) -> Path:
    """The file that a name means; fetched first where it lies on the Hub.

    Args:
        path: as `load` takes it.

    Raises:
        ArtifactError: it cannot be fetched, or a folder holds no artifact.
    """
    name = os.fspath(path)
    if name.startswith(PREFIX):
        return _fetch(name)
    found = Path(name)
    if not found.is_dir():
        return found  # whatever is wrong with it, reading it tells
    if not (found / WEIGHTS).is_file():
        raise ArtifactError(f"{found} is a folder without {WEIGHTS}.", hint="vitcompress export --to hf writes one.")
    return found / WEIGHTS


def _fetch(name: str) -> Path:
    from huggingface_hub import hf_hub_download  # seldom wanted, and slow to import

    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        return Path(hf_hub_download(repo, WEIGHTS, revision=revision or None))
    except Exception as error:  # the Hub client raises dozens of types, of three libraries
        raise ArtifactError(
            f"{name} cannot be fetched: {first_line(error)}",
            hint="Check the name and the network; of a private repository, log in first: hf auth login.",
        ) from error
