"""Read the tensors in a file of weights without running code in it or filling the memory."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from timm.models import load_state_dict as read_checkpoint
from torch import Tensor

from vitcompress.errors import CheckpointError, first_line, shorten

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name; runs no code in the file.

    Args:
        path: a `.safetensors` file, or a file that timm or torch saved; the state dict may be
            nested as in timm's checkpoints.

    Raises:
        CheckpointError: the file is missing or unreadable, holds no plain tensors, or is larger in
            memory than on disk.
    """
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
        raise CheckpointError(f"--checkpoint {path} {reason}.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"--checkpoint {path} is empty.")
    try:
        _check_archive(path)
        weights = read_checkpoint(str(path), weights_only=True)
    except Exception as error:  # a broken file can make torch, pickle, zipfile or safetensors raise anything
        raise unreadable_error(f"--checkpoint {path}", error) from error
    tensors = {name: t for name, t in weights.items() if isinstance(t, Tensor)} if isinstance(weights, dict) else {}
    if not tensors:
        raise CheckpointError(f"--checkpoint {path} holds no named tensors.", hint="Save only the state dict.")
    unsupported = [name for name, t in tensors.items() if not _is_plain(t)]
    if unsupported:
        raise CheckpointError(
            f"--checkpoint {path}: tensors that are not dense arrays of real numbers: {shorten(unsupported)}.",
            hint="Save dense, unquantized tensors that are on the CPU.",
        )
    expanded = [name for name, t in tensors.items() if t.nbytes > path.stat().st_size]  # views that repeat numbers
    if expanded:
        raise CheckpointError(f"--checkpoint {path}: tensors larger than the file: {shorten(expanded)}.")
    return tensors


def _is_plain(t: Tensor) -> bool:
    """Return whether a tensor is a dense, unquantized array of real numbers on the CPU."""
    dense = t.layout == torch.strided and t.device.type == "cpu" and not (t.is_nested or t.is_quantized)
    return dense and (t.dtype.is_floating_point or t.dtype in _INTEGERS)


def _check_archive(path: Path) -> None:
    """Check that a file that torch saved is not larger in memory than on disk.

    torch writes uncompressed archives.

    Raises:
        ValueError: the archive is compressed, or its entries overlap.
        zipfile.BadZipFile: the archive is broken.
    """
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\3\4"  # torch goes by these bytes alone
    if path.suffix == ".safetensors" or not is_archive:
        return
    with zipfile.ZipFile(path) as archive:
        unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
    if unpacked_bytes > path.stat().st_size:
        raise ValueError(f"it is an archive of {unpacked_bytes:,} bytes packed into {path.stat().st_size:,}")


def check_folder(folder: Path) -> None:
    """Check that reading a folder's files neither blocks forever nor fills the memory.

    Args:
        folder: the folder that local-dir: names; may not exist.

    Raises:
        CheckpointError: names the first file that fails the check.
    """
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"MODEL local-dir:{folder}: {path.name} is not a regular file.")
        if path.suffix in (".bin", ".pth", ".pt") and path.is_file():
            try:
                _check_archive(path)
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise unreadable_error(f"MODEL local-dir:{folder}: {path.name}", error) from error


def unreadable_error(what: str, error: BaseException) -> CheckpointError:
    """Return the `CheckpointError` for an error that reading a file raised.

    Args:
        what: the flag and the file, at the start of the message.
        error: an error of torch, pickle, zipfile or safetensors.
    """
    if isinstance(error, pickle.UnpicklingError) or isinstance(error.__cause__, pickle.UnpicklingError):
        return CheckpointError(
            f"{what} holds more than tensors; the code in it was not run.",
            hint="Save only the state dict, preferably as .safetensors.",
        )
    return CheckpointError(
        f"{what} cannot be read: {first_line(error).rstrip('.')}.", hint="It may be truncated: download it again."
    )
