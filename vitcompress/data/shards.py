"""Find the images of tar shards (WebDataset): plain .tar files are indexed, others are streamed.

n01440764_10026.jpg    an image; all files of a sample have the same name and different extensions
n01440764_10026.cls    its label: the number or name of a class
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitcompress.data.classes import ImageClasses
from vitcompress.data.readers import EXTENSIONS, decode
from vitcompress.data.sets import TRAIN_NAMES, VAL_NAMES, RawImageSet
from vitcompress.data.streams import StreamReader, read_shard
from vitcompress.data.tarfiles import BROKEN, Member, dotted_error, find_members, is_image, is_remote, read_member
from vitcompress.errors import DataError, shorten
from vitcompress.runtime.extras import require_extra

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class TarReader:
    """Images at known offsets in plain tar files.

    Attributes:
        shards: paths of the tar files.
        shard: position in `shards` of each image's file, `[N]`.
        offset: offset of each image in its file, in bytes, `[N]`.
        size: size of each image, in bytes, `[N]`.
        names: name of each image in its file.
    """

    shards: tuple[str, ...]
    shard: np.ndarray[Any, Any]
    offset: np.ndarray[Any, Any]
    size: np.ndarray[Any, Any]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Decode image `index`."""
        with Path(self.shards[self.shard[index]]).open("rb") as file:
            file.seek(int(self.offset[index]))
            return decode(file.read(int(self.size[index])), at_least)

    def where(self, index: int) -> str:
        """Return the shard of image `index`, and its name there."""
        return f"{self.shards[self.shard[index]]}:{self.names[index]}"


def open_shards(place: str, split: str, where: str, image_key: str, label_key: str) -> RawImageSet | None:
    """Find the images of shards.

    Args:
        place: a folder of shards, one shard, several as `train-{0000..0099}.tar` or joined by `::`,
            or their URLs.
        split: "train" or "val".
        where: name of the shards in messages.
        image_key: extension of the images; empty for any known one.
        label_key: extension of the labels; empty for `cls`.

    Returns:
        The images; None if `split` is "val" and no shard is named so.

    Raises:
        DataError: the package, a shard or its images are missing, or a file is not a tar file.
    """
    urls = _urls(place, split, where)
    if not urls:
        return None
    label_key = label_key or "cls"
    if any(_must_stream(url) for url in urls):
        return _stream(urls, where, image_key, label_key)
    return _indexed(urls, where, image_key, label_key)


def _urls(place: str, split: str, where: str) -> tuple[str, ...]:
    require_extra("webdataset", where, DataError)
    from webdataset.shardlists import expand_urls

    if Path(place).is_dir():
        return _in_folder(Path(place), split, where)
    if split == "val":
        return ()
    try:
        urls = tuple(expand_urls(place))
    except (ValueError, AssertionError) as error:  # unbalanced braces, unknown variables
        raise DataError(
            f"{where} cannot be expanded: {error}.", hint="For example wds:images-{0000..0099}.tar"
        ) from error
    missing = [url for url in urls if not is_remote(url) and not Path(url).is_file()]
    if missing:
        raise DataError(f"{where}: {len(missing)} of {len(urls)} shard(s) do not exist: {shorten(missing, limit=3)}.")
    return urls


def _in_folder(root: Path, split: str, where: str) -> tuple[str, ...]:
    """Find the shards of a split, by its name among the words of their paths."""
    shards = {path for path in root.rglob("*") if path.is_file() and path.name.endswith((".tar", *PACKED))}
    if not shards:
        raise DataError(f"{where} has no shards in it.", hint=f"Looked for .tar, {', '.join(PACKED)}.")
    words = {path: set(re.split(r"[^a-z]+", str(path.relative_to(root)).lower())) for path in shards}
    train = {path for path in shards if words[path] & set(TRAIN_NAMES)}
    val = {path for path in shards - train if words[path] & set(VAL_NAMES)}
    if not (train and val):
        train, val = shards, set()
    chosen = train if split == "train" else val
    return tuple(sorted(str(path.absolute()) for path in chosen))  # a relative `pipe:…` would run as a command


def _must_stream(url: str) -> bool:
    return is_remote(url) or url.endswith(PACKED)


def _stream(urls: tuple[str, ...], where: str, image_key: str, label_key: str) -> RawImageSet:
    """Return shards as a stream; the first sample tells whether there are labels."""
    first = next(read_shard(urls[0], image_key, label_key), None)
    if first is None or first.error:
        raise DataError(
            f"{where}: {urls[0]}: {first.error if first else 'no images'}.", hint=_hint_looked_for(image_key)
        )
    return RawImageSet(where, StreamReader(urls, image_key, label_key, has_labels=first.target is not None))


def _indexed(urls: tuple[str, ...], where: str, image_key: str, label_key: str) -> RawImageSet:
    """Index shards by one walk over the headers of their members."""
    others: Counter[str] = Counter()
    bare: list[str] = []  # samples with a label and no image
    rows = [
        (number, *row) for number, url in enumerate(urls) for row in _members(url, image_key, label_key, others, bare)
    ]
    if not rows:
        contents = f"; it has .{', .'.join(sorted(others))}" if others else " and no other files"
        raise DataError(f"{where} has no images in it{contents}.", hint=_hint_looked_for(image_key))
    numbers, offsets, sizes, names, targets = zip(*rows, strict=True)
    reader = TarReader(urls, np.array(numbers, np.int32), np.array(offsets, np.int64), np.array(sizes, np.int64), names)
    labels = [target for target in targets if target is not None]
    notes = (f"{where}: samples left out, which have a label and no known image: {shorten(bare)}.",) if bare else ()
    if not labels:
        return RawImageSet(where, reader, notes=notes)
    if len(labels) < len(targets):
        raise DataError(
            f"{where}: {len(targets) - len(labels)} of {len(targets)} images have no .{label_key}, "
            f"for example {names[targets.index(None)]}."
        )
    names = tuple(sorted(set(labels)))
    position = {name: number for number, name in enumerate(names)}
    indices = tuple(map(int, names)) if all(name.isdecimal() for name in names) else None
    classes = ImageClasses(names, where, "labels", indices)
    return RawImageSet(where, reader, tuple(position[target] for target in labels), classes, notes)


def _members(
    url: str, image_key: str, label_key: str, others: Counter[str], bare: list[str]
) -> list[tuple[int, int, str, str | None]]:
    """Return offset, size, name and label of each image.

    Counts other extensions in `others`, and adds samples with a label and no image to `bare`.
    """
    images: dict[str, tarfile.TarInfo] = {}
    dotted: dict[str, str] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(url, "r:", tarinfo=Member) as tar:
            for key, extension, member in find_members(tar, image_key, label_key, others, dotted):
                if is_image(extension, image_key):
                    images.setdefault(key, member)
                else:
                    labels[key] = read_member(tar, member).decode("utf-8", "replace").strip()
    except BROKEN as error:
        raise DataError(
            f"{url} is not a complete, uncompressed tar file: {error}.", hint="Compressed shards must be named .tar.gz."
        ) from error
    lost = [name for key, name in dotted.items() if key not in images]
    if lost:
        raise DataError(f"{url}: {dotted_error(lost[0])}.", hint=f"{len(lost)} images have such names.")
    bare += [key for key in labels if key not in images]
    return [(image.offset_data, image.size, image.name, labels.get(key)) for key, image in images.items()]


def _hint_looked_for(image_key: str) -> str:
    if image_key:
        return f"Looked for .{image_key}."
    return f"Looked for {', '.join(sorted(EXTENSIONS))}. Name another extension with --image-key."
