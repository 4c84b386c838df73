"""Which tensors does a file of weights hold, and is it safe to look?"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from timm.models import load_state_dict as read_checkpoint
from torch import Tensor

from vitcompress.errors import CheckpointError, first_line, shorten

_ARCHIVE = b"PK\3\4"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, whatever they are wrapped in; no code in the file is run.

    Args:
        path: of timm's or torch's, or a `.safetensors` file.

    Raises:
        CheckpointError: the file is missing, unreadable, not of tensors, or larger in memory than on the disk.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise CheckpointError(f"--checkpoint {path} {what}.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"--checkpoint {path} is empty.")
    try:
        _check_archive(path)
        weights = read_checkpoint(str(path), weights_only=True)
    except Exception as error:  # whatever a broken file makes torch, pickle, zipfile or safetensors say
        raise unreadable(f"--checkpoint {path}", error) from error
    tensors = {name: t for name, t in weights.items() if isinstance(t, Tensor)} if isinstance(weights, dict) else {}
    if not tensors:
        raise CheckpointError(f"--checkpoint {path} holds no tensors by name.", hint="Save the state dict alone.")
    odd = [name for name, t in tensors.items() if not _is_plain(t)]
    if odd:
        raise CheckpointError(
            f"--checkpoint {path}: tensors that are no plain tables of real numbers: {shorten(odd)}.",
            hint="Save dense, unquantised tensors that are on the CPU.",
        )
    swollen = [name for name, t in tensors.items() if t.nbytes > path.stat().st_size]  # one number, seen as many
    if swollen:
        raise CheckpointError(f"--checkpoint {path}: tensors larger than the file: {shorten(swollen)}.")
    return tensors


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor is a table of real numbers in memory: not sparse, quantised, complex, or without data."""
    dense = t.layout == torch.strided and t.device.type == "cpu" and not (t.is_nested or t.is_quantized)
    return dense and (t.dtype.is_floating_point or t.dtype in _INTEGERS)


def _check_archive(path: Path) -> None:
    """Make sure that a file of torch's is no larger in memory than on the disk: torch writes archives uncompressed.

    Raises:
        ValueError: it is.
        zipfile.BadZipFile: it is an archive, and a broken one.
    """
    if path.suffix == ".safetensors" or not _is_archive(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(each.file_size for each in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"it is an archive of {unpacked:,} bytes packed into {path.stat().st_size:,}")


def _is_archive(path: Path) -> bool:
    """Whether torch takes a file for an archive: by its first bytes alone, whatever is wrong with its end."""
    with path.open("rb") as file:
        return file.read(len(_ARCHIVE)) == _ARCHIVE


def check_folder(folder: Path) -> None:
    """Make sure that reading a folder's files neither waits for ever nor fills the memory.

    Raises:
        CheckpointError: naming the first that would.
    """
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"MODEL local-dir:{folder}: {path.name} is no regular file.")
        if path.suffix in (".bin", ".pth", ".pt") and path.is_file():
            try:
                _check_archive(path)
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise unreadable(f"MODEL local-dir:{folder}: {path.name}", error) from error


def unreadable(what: str, error: BaseException) -> CheckpointError:
    """The user's words for an error of torch, pickle or safetensors that reading `what` ended in."""
    if isinstance(error, pickle.UnpicklingError) or isinstance(error.__cause__, pickle.UnpicklingError):
        return CheckpointError(
            f"{what} is no plain table of tensors; the code in it was not run.",
            hint="Save the state dict alone, best as .safetensors.",
        )
    return CheckpointError(
        f"{what} cannot be read: {first_line(error).rstrip('.')}.", hint="It may be cut short: fetch it again."
    )
