"""Read tensors from a .safetensors file whose header has been checked.

    length of the header, 8 bytes  │  the header, JSON  │  the tensors, without gaps

safetensors itself maps the file into memory, which has two drawbacks here. Tensors start at any
multiple of four bytes, but torch's kernels round differently off their usual alignment, so each
tensor would have to be copied. And if the file changes while it is mapped, the model changes with
it, or the process dies. No torch is imported until a tensor is read.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vitcompress.artifact.digest import memory_of
from vitcompress.errors import ArtifactError, first_line, printable

if TYPE_CHECKING:
    from torch import Tensor

# Usual headers have tens of kB; one with 40 blocks and long names of 21,841 classes has 2 MB.
# Parsed JSON takes 45 times the memory of its text.
MAX_HEADER_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 20
_DTYPES = {  # torch's names and the bytes of a number
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8),
    "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip
_Count = Annotated[int, Field(ge=0)]


class _Entry(BaseModel):
    """A tensor as the header describes it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[list[_Count], Field(max_length=8)]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


_ENTRIES = TypeAdapter(dict[str, _Entry])
_METADATA = TypeAdapter(dict[str, str], config=ConfigDict(strict=True))


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file.

    Attributes:
        dtype: type as torch prints it, such as "torch.float32".
        shape: shape of the tensor.
        start: position of the first byte in the file.
        num_bytes: length in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class TensorFile:
    """An open file with a checked header: its tensors fill it exactly.

    Attributes:
        path: path of the file, for messages.
        metadata: text that the header holds beside the tensors.
        places: where each tensor lies, by name.
        file: the open file, unbuffered.
    """

    path: Path
    metadata: Mapping[str, str]
    places: Mapping[str, Place]
    file: io.FileIO

    def tensor(self, name: str) -> Tensor:
        """Read a tensor into its own memory, aligned as torch aligns it."""
        import torch  # only here, because reading a manifest needs no torch

        place = self.places[name]
        t = torch.empty(place.shape, dtype=getattr(torch, place.dtype.removeprefix("torch.")))
        if place.num_bytes:
            self.file.seek(place.start)
            _read_into(memory_of(t), self.file)
        return t

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, 1 MiB at a time; each chunk overwrites the previous one."""
        place = self.places[name]
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, place.num_bytes)))
        self.file.seek(place.start)
        for start in range(0, place.num_bytes, _CHUNK_BYTES):
            chunk = buffer[: place.num_bytes - start]
            _read_into(chunk, self.file)
            yield chunk


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a .safetensors file and check its header; read no tensor.

    Raises:
        ArtifactError: the file is missing, not a regular file or unreadable, or its header does not
            describe it.
    """
    if not path.is_file():  # opening a named pipe would wait forever
        raise ArtifactError(f"{path} {'is not a file' if path.exists() else 'does not exist'}.")
    try:
        with io.FileIO(path) as file:
            yield TensorFile(path, *_read_header(file), file)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_fault(error)
        hint = "It may be incomplete: download or copy it again."
        raise ArtifactError(f"{path} cannot be read: {reason}.", hint=hint) from error


def strict_json(text: str | bytes) -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN or infinity, no number beyond a double.

    Raises:
        ValueError: the text is not such JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_not_a_number, parse_float=_finite)


def first_fault(error: BaseException) -> str:
    """Return the first fault that a JSON or schema error reports, short and printable."""
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:80] for part in fault["loc"][:6])
        return _ascii(f"{where}: {fault['msg'][:200]}".removeprefix(": "))
    return _ascii(first_line(error)[:200].rstrip("."))


def _ascii(text: str) -> str:
    return printable(text).encode("ascii", "replace").decode()


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    items = list(pairs)
    tree = dict(items)
    if len(tree) != len(items):
        raise ValueError("a key occurs twice")
    return tree


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_a_number(text[:20])


def _read_header(file: io.FileIO) -> tuple[dict[str, str], dict[str, Place]]:
    """Return the metadata and the place of each tensor.

    Raises:
        ValueError: the header does not describe this file.
    """
    total = file.seek(0, io.SEEK_END)
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= total - 8:
        raise ValueError("its header is longer than the file" if len(prefix) == 8 else "it has no header")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes; the limit is {MAX_HEADER_BYTES:,}")
    text = bytearray(length)
    _read_into(memoryview(text), file)
    tree = strict_json(text.decode("utf-8"))
    if not isinstance(tree, dict):
        raise ValueError("its header is not a JSON object")
    metadata = _METADATA.validate_python(tree.pop("__metadata__", {}))
    unprintable = [name for name in tree if not name.isprintable()]
    if unprintable:
        raise ValueError(f"the name of tensor {unprintable[0][:80]!a} has characters that cannot be printed")
    entries = _ENTRIES.validate_python(tree)
    places = {name: _place_of(name, entry, 8 + length) for name, entry in entries.items()}
    _check_gapless(places, 8 + length, total)
    return metadata, places


def _check_gapless(places: Mapping[str, Place], start: int, end: int) -> None:
    """Check that tensors fill the bytes from `start` to `end`, without gaps or overlaps.

    Raises:
        ValueError: they do not.
    """
    position = start
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if place.start != position:
            raise ValueError(f"tensor {name} does not start where the previous one ends")
        position += place.num_bytes
    if position != end:
        raise ValueError(f"its tensors end at byte {position:,}, but the file ends at byte {end:,}")


def _place_of(name: str, entry: _Entry, start: int) -> Place:
    (dtype, item_bytes), (first, end) = _DTYPES[entry.dtype], entry.data_offsets
    if end - first != math.prod(entry.shape) * item_bytes:
        raise ValueError(f"tensor {name} has a shape that does not match its number of bytes")
    return Place(f"torch.{dtype}", tuple(entry.shape), start + first, end - first)


def _read_into(buffer: memoryview, file: io.FileIO) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise ArtifactError(f"{file.name} was cut short while it was read.", hint="Download or copy it again.")
        buffer = buffer[count:]
