"""Read an artifact's header and check its digest, without torch.

One .safetensors file holds the model. Each shared tensor is stored once, under its donor's name;
the manifest is JSON in the header, under the key "vitcompress". The digest covers the rest of that
JSON and every tensor, so any change to the file is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcompress.artifact.digest import memory_of, tensor_label
from vitcompress.artifact.manifest import Header, Manifest, parse_header
from vitcompress.artifact.tensorfile import TensorFile, open_tensors
from vitcompress.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


def read_manifest(path: Path) -> Manifest:
    """Read an artifact's manifest, after checking the digest of the whole file.

    Args:
        path: path of the file; `vitcompress.artifact.hub.locate` finds it from a folder or a name
            on the Hub.

    Raises:
        ArtifactError: the file is missing, cut short, altered, of a newer format, or not an
            artifact.
    """
    with open_tensors(path) as file:
        header = read_header(file)
        check_digest(file, header)
    return header.manifest


def read_header(file: TensorFile) -> Header:
    """Read and validate an artifact's header; the digest is not checked.

    Raises:
        ArtifactError: the format is newer than this package, or the file is not an artifact.
    """
    if "vitcompress" not in file.metadata:
        raise ArtifactError(f"{file.path} is a safetensors file, but not one that vitcompress wrote.")
    return parse_header(file.path, file.metadata["vitcompress"])


def check_digest(file: TensorFile, header: Header, keep: dict[str, Tensor] | None = None) -> None:
    """Read every tensor once and compare the digest.

    Args:
        file: the open file.
        header: header of that file.
        keep: dictionary that receives the tensors; None to drop them as they are read, which needs
            no torch.

    Raises:
        ArtifactError: the file was altered.
    """
    digest = hashlib.sha256()
    for name, place in sorted(file.places.items()):
        digest.update(tensor_label(name, place.dtype, place.shape))
        if keep is None:
            for chunk in file.chunks(name):
                digest.update(chunk)
        else:
            keep[name] = file.tensor(name)
            digest.update(memory_of(keep[name]))
    if header.sha256 != file_digest(header.tree, digest.hexdigest()):
        raise ArtifactError(
            f"{file.path} was altered after it was written (SHA-256 differs).", hint="Download or make it again."
        )


def file_digest(tree: Mapping[str, Any], tensors_sha256: str) -> str:
    """Return the digest of an artifact.

    Args:
        tree: JSON of the header, without the digest.
        tensors_sha256: digest of the tensors.
    """
    return hashlib.sha256(f"{json.dumps(tree, sort_keys=True)}{tensors_sha256}".encode()).hexdigest()
