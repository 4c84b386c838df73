"""Where does each tensor lie in a .safetensors file, and how does it get into memory?  Read once, checked, aligned.

    8 bytes  length of the header   │   the header, JSON   │   the tensors, one after the other, without gaps

safetensors writes these files. It reads them by mapping them, which suits us in two ways not: tensors lie at any
multiple of four bytes, where kernels round differently than on their alignment, so each would have to be copied; and a
file that is changed while it is mapped changes the model, or ends the process.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from vitcompress.errors import ArtifactError, printable

# ours have tens of kB, one of 40 blocks and long names of 21,841 classes two MB; in memory JSON takes 45 times as much
MOST_HEADER_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_Count = Annotated[int, Field(ge=0)]


class _Place(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[list[_Count], Field(max_length=8)]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


_PLACES = TypeAdapter(dict[str, _Place])
_METADATA = TypeAdapter(dict[str, str], config=ConfigDict(strict=True))


@dataclass(frozen=True)
class Place:
    """One tensor of a file.

    Attributes:
        dtype: of its numbers.
        shape: of it.
        start: of its first byte, from the file's beginning.
        num_bytes: that it takes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class TensorFile:
    """An open file whose header was checked: its tensors fill it exactly, and none is larger than the file.

    Attributes:
        path: for messages.
        metadata: what the header says beside tensors.
        places: of the tensors, by name.
        file: unbuffered.
    """

    path: Path
    metadata: Mapping[str, str]
    places: Mapping[str, Place]
    file: io.FileIO

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, in memory of its own, on torch's alignment."""
        place = self.places[name]
        t = torch.empty(place.shape, dtype=place.dtype)
        if place.num_bytes:
            self.file.seek(place.start)
            self._read_into(t.flatten().view(torch.uint8).numpy().data)
        return t

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, a megabyte at a time; each chunk is overwritten by the next but one."""
        place = self.places[name]
        turns = [memoryview(bytearray(min(_CHUNK_BYTES, place.num_bytes))) for _ in range(2)]
        for number, start in enumerate(range(0, place.num_bytes, _CHUNK_BYTES)):
            chunk = turns[number % 2][: place.num_bytes - start]
            self.file.seek(place.start + start)
            self._read_into(chunk)
            yield chunk

    def _read_into(self, buffer: memoryview) -> None:
        while buffer:
            count = self.file.readinto(buffer)
            if not count:
                raise ArtifactError(f"{self.path} was cut short while it was read.", hint="Fetch it again.")
            buffer = buffer[count:]


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a .safetensors file and check its header; no tensor is read.

    Raises:
        ArtifactError: missing, not a regular file, unreadable, or with a header that does not describe this file.
    """
    if not path.is_file():  # a named pipe would be waited on for ever
        raise ArtifactError(f"{path} {'is not a file' if path.exists() else 'does not exist'}.")
    try:
        with io.FileIO(path) as file:
            yield TensorFile(path, *_header(file), file)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_fault(error)
        raise ArtifactError(f"{path} cannot be read: {reason}.", hint="It may be cut short: fetch it again.") from error


def plain_json(text: str | bytes) -> Any:
    """JSON as the standard has it: no key twice in an object, no NaN or infinity by name, no number beyond a double.

    Raises:
        ValueError: it is not.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)


def first_fault(error: BaseException) -> str:
    """The first thing that an error of JSON or of a schema says, short enough to be shown."""
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:80] for part in found["loc"][:6])
        return _plain(f"{where}: {found['msg'][:200]}".removeprefix(": "))
    text = str(error).strip() or type(error).__name__
    return _plain(text.splitlines()[0][:200].rstrip("."))


def _plain(text: str) -> str:
    return printable(text).encode("ascii", "replace").decode()


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    every = list(pairs)
    found = dict(every)
    if len(found) != len(every):
        raise ValueError("a name is there twice")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text[:20])


def _header(file: io.FileIO) -> tuple[dict[str, str], dict[str, Place]]:
    total = file.seek(0, io.SEEK_END)
    file.seek(0)
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= total - 8:
        raise ValueError("its header is longer than the file" if len(first) == 8 else "it has no header")
    if length > MOST_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes, at most {MOST_HEADER_BYTES:,} are read")
    tree = plain_json(_exactly(file.read, length).decode("utf-8"))
    if not isinstance(tree, dict):
        raise ValueError("its header is no JSON object")
    metadata = _METADATA.validate_python(tree.pop("__metadata__", {}))
    odd = [name for name in tree if not name.isprintable()]
    if odd:
        raise ValueError(f"the name of tensor {odd[0][:80]!a} holds what cannot be printed")
    places = {name: _place(name, place, 8 + length) for name, place in _PLACES.validate_python(tree).items()}
    end = 8 + length
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if place.start != end:
            raise ValueError(f"tensor {name} does not begin where the last one ends")
        end += place.num_bytes
    if end != total:
        raise ValueError(f"its tensors end at byte {end:,} and the file at byte {total:,}")
    return metadata, places


def _place(name: str, place: _Place, start: int) -> Place:
    dtype, (first, end) = _DTYPES[place.dtype], place.data_offsets
    if end - first != math.prod(place.shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} has another shape than it has bytes")
    return Place(dtype, tuple(place.shape), start + first, end - first)


def _exactly(read: Callable[[int], bytes], count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = read(count - len(found))
        if not more:
            raise ValueError("it was cut short while it was read")
        found += more
    return found
