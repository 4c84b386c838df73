"""Find an artifact's file by its path, in a folder, or on the Hugging Face Hub.

mini.safetensors      a file
folder/               written by `export --to hf`; holds model.safetensors
hf-hub:USER/REPO      the same on the Hub; hf-hub:USER/REPO@REVISION for a branch, a tag or a commit
"""

from __future__ import annotations

import os
from pathlib import Path

from vitcompress.errors import ArtifactError, first_line
from vitcompress.runtime.caches import cache_hint

WEIGHTS = "model.safetensors"
PREFIX = "hf-hub:"


def locate(path: str | os.PathLike[str]) -> Path:
    """Return the path of an artifact's file; download it first if it is on the Hub.

    Args:
        path: a file, which need not exist; a folder with model.safetensors; or `hf-hub:USER/REPO`.

    Raises:
        ArtifactError: the download fails, or the folder has no artifact.
    """
    name = os.fspath(path)
    if name.startswith(PREFIX):
        return _download(name)
    file = Path(name)
    if not file.is_dir():
        return file  # reading it reports what is wrong with it
    if not (file / WEIGHTS).is_file():
        raise ArtifactError(f"{file} is a folder without {WEIGHTS}.", hint="vitcompress export --to hf writes one.")
    return file / WEIGHTS


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download  # seldom needed, and slow to import

    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        return Path(hf_hub_download(repo, WEIGHTS, revision=revision or None))
    except Exception as error:  # the Hub client raises dozens of types, from three libraries
        raise ArtifactError(
            f"{name} cannot be downloaded: {first_line(error)}",
            hint=cache_hint(error)
            or "Check the name and the network; for a private repository, log in first: hf auth login.",
        ) from error
