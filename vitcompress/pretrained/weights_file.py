"""Read what is in a file of weights without running code in it or filling the memory."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitcompress.errors import CheckpointError, first_line, shorten
from vitcompress.pretrained.jax_weights import read_npz
from vitcompress.pretrained.quiet import without_library_output

Tree = Mapping[str, Any]  # what a file holds: tensors by name, or such trees by key

INDEX = ".index.json"  # end of the name of a file that lists shards
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # as the Hub names them
_SAVE_HINT = "Save only the state dict, preferably as .safetensors."
_TRUNCATED_HINT = "It may be truncated: download it again."
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MAX_INDEX_BYTES = 64 << 20
_SCALAR: Any = np.float64(0).__reduce__()[0]  # numpy's constructor of scalars, which has moved between its versions
# plain data that training scripts keep beside the weights; constructing it runs no code of the file
_PLAIN: list[Any] = [
    argparse.Namespace, _SCALAR, np.dtype, *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")),
]  # fmt: skip


def read_tree(path: Path, what: str) -> Tree:
    """Return what a checkpoint holds: tensors and whatever is saved beside them; runs no code.

    The content decides how a file is read, not its name.

    Args:
        path: a file that safetensors, torch or numpy wrote, or the index of its shards.
        what: the flag and the file, at the start of messages.

    Raises:
        CheckpointError: the file is missing or unreadable, or is larger in memory than on disk.
    """
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
        raise CheckpointError(f"{what} {reason}.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{what} is empty.")
    if path.name.endswith(INDEX):
        return _read_shards(path, what)
    try:
        if _is_safetensors(path):
            return load_file(path, device="cpu")
        _check_foreign(path, what)
        _check_archive(path)
        if any(name.endswith(".npy") for name in _archived_names(path)):
            return read_npz(path)
        with torch.serialization.safe_globals(_PLAIN), without_library_output(), path.open("rb") as file:
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a broken file can make torch, pickle, zipfile or safetensors raise anything
        raise unreadable_error(what, error) from error
    return tree if isinstance(tree, Mapping) else {}


def check_tensors(tensors: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Make sure that tensors are plain arrays that do not take more memory than their file.

    Args:
        tensors: the tensors to use.
        path: the file that they are from.
        what: the flag and the file, at the start of messages.

    Raises:
        CheckpointError: names the tensors that are not.
    """
    unsupported = [name for name, t in tensors.items() if not is_plain(t)]
    if unsupported:
        raise CheckpointError(
            f"{what}: tensors that are not dense arrays of real numbers: {shorten(unsupported)}.",
            hint="Save dense, unquantized tensors that are on the CPU.",
        )
    size = file_bytes(path)
    expanded = [name for name, t in tensors.items() if t.nbytes > size]  # views that repeat numbers
    if expanded:
        raise CheckpointError(f"{what}: tensors larger than the file: {shorten(expanded)}.")


def file_bytes(path: Path) -> int:
    """Return the size of a file of weights, or of all shards that an index lists."""
    if not path.name.endswith(INDEX):
        return path.stat().st_size
    return sum(shard.stat().st_size for shard in path.parent.iterdir() if shard.is_file() and shard != path)


def weights_in(folder: Path) -> Path | None:
    """Return the file of weights in a folder, or the index of its shards; None without either."""
    names = (*WEIGHT_FILES, *(f"{name}{INDEX}" for name in WEIGHT_FILES))
    return next((path for name in names if (path := folder / name).is_file()), None)


def _read_shards(index: Path, what: str) -> dict[str, Any]:
    """Return the tensors of all shards that an index lists.

    Raises:
        CheckpointError: the index is unreadable, or a shard lacks tensors that it lists.
    """
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("it is too large for an index")
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shard_of = {name: str(shard) for name, shard in weight_map.items()}
        names = sorted(set(shard_of.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{what} is not an index of shards: {first_line(error)}.") from error
    outside = [name for name in names if Path(name).name != name or name.endswith(INDEX)]
    if outside:
        raise CheckpointError(f"{what} lists shards outside its folder: {shorten(outside)}.")
    tensors: dict[str, Any] = {}
    for name in names:
        shard = read_tree(index.parent / name, f"{what}: its shard {name}")
        listed = {tensor for tensor, place in shard_of.items() if place == name}
        if listed != shard.keys():
            raise CheckpointError(
                f"{what}: its shard {name} holds other tensors than the index lists: "
                f"{shorten(sorted(listed ^ shard.keys()), limit=3)}.",
                hint="Download all files of the model again.",
            )
        tensors.update(shard)
    return tensors


def is_plain(t: Tensor) -> bool:
    """Return whether a tensor is a dense, unquantized array of real numbers on the CPU."""
    dense = t.layout == torch.strided and t.device.type == "cpu" and not (t.is_nested or t.is_quantized)
    return dense and (t.dtype.is_floating_point or t.dtype in _INTEGERS)


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts as safetensors files do: the length of a header, then JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= path.stat().st_size


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"  # torch goes by these bytes alone


def _check_archive(path: Path) -> None:
    """Check that a file that torch saved is not larger in memory than on disk.

    torch writes uncompressed archives.

    Raises:
        ValueError: the archive is compressed, or its entries overlap.
        zipfile.BadZipFile: the archive is broken.
    """
    if not _is_archive(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
    if unpacked_bytes > path.stat().st_size:
        raise ValueError(f"it is an archive of {unpacked_bytes:,} bytes packed into {path.stat().st_size:,}")


def _check_foreign(path: Path, what: str) -> None:
    """Name the files that people take for checkpoints but that are none, and what to do with them.

    Raises:
        CheckpointError: the file is one of them.
    """
    if any(re.search(r"(^|/)constants\.pkl$", name) for name in _archived_names(path)):
        raise CheckpointError(
            f"{what} is a TorchScript archive, a program and not only weights.",
            hint=f"Save its weights alone: torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth').",
        )
    for pattern, kind in _FOREIGN:
        if pattern.search(path.name):
            raise CheckpointError(f"{what} is a file of {kind}, not of torch.", hint=_SAVE_HINT)
    with path.open("rb") as file:
        start = file.read(_TAR_MARK.stop)
    if not start.startswith((b"PK\3\4", b"\x80")) and start[_TAR_MARK] != b"ustar":
        hints = (hint for beginning, hint in _NO_WEIGHTS.items() if start.lstrip().startswith(beginning))
        raise CheckpointError(
            f"{what} cannot be read: it is neither a safetensors file nor one of torch.",
            hint=next(hints, _TRUNCATED_HINT),
        )


_TAR_MARK = slice(257, 262)  # in what torch wrote before version 0.2
_NO_WEIGHTS = {
    b"version https://git-lfs": "It is a pointer of Git LFS: run git lfs pull.",
    b"<": "It is a web page: download the file itself.",
}

_FOREIGN = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        (r"\.onnx$", "ONNX"),
        (r"\.(h5|hdf5|keras)$|\.ckpt\.(index|data-.*)$", "TensorFlow"),
        (r"\.(tflite|pb)$", "TensorFlow"),
        (r"\.msgpack$", "Flax"),
        (r"\.gguf$", "GGUF"),
        (r"\.npy$", "numpy"),
    )
)


def _archived_names(path: Path) -> list[str]:
    if not _is_archive(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def folder_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, in order; none where there is no such folder."""
    yield from sorted(folder.iterdir() if folder.is_dir() else ())


def check_folder(folder: Path) -> None:
    """Check that reading a folder's files neither blocks forever nor fills the memory.

    Args:
        folder: the folder that local-dir: names; may not exist.

    Raises:
        CheckpointError: names the first file that fails the check.
    """
    for path in folder_files(folder):
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
    message = first_line(error).rstrip(".")
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in message:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        return CheckpointError(  # torch's advice to switch its protection off is not passed on
            f"{what} holds more than tensors{f', an object of type {kind[1]}' if kind else ''}; the code in it was "
            "not run.",
            hint=_SAVE_HINT,
        )
    return CheckpointError(f"{what} cannot be read: {message}.", hint=_TRUNCATED_HINT)
