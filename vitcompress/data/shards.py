"""Which images are in tar shards (WebDataset)?  Plain .tar files are indexed, then read at random; others are streamed.

n01440764_10026.jpg    an image: every file of a sample has the sample's name and its own extension
n01440764_10026.cls    its label: the number of a class of the model, or its name
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitcompress.data.readers import EXTENSIONS, decoded
from vitcompress.data.sets import TRAIN_NAMES, VAL_NAMES, RawImageSet
from vitcompress.data.streams import StreamReader, read_shard
from vitcompress.data.tarfiles import BROKEN, Member, content, is_remote, wanted
from vitcompress.errors import DataError, shorten
from vitcompress.runtime.extras import require_extra

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class TarReader:
    """Images at known places of plain tar files.

    Attributes:
        shards: the files.
        shard: of each image, the position of its file, `[N]`.
        offset: where its bytes begin there, `[N]`.
        size: how many they are, `[N]`.
        names: what it is called there.
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
            return decoded(file.read(int(self.size[index])), at_least)

    def where(self, index: int) -> str:
        """Its shard, and its name there."""
        return f"{self.shards[self.shard[index]]}:{self.names[index]}"


def open_shards(place: str, split: str, where: str, image_key: str, label_key: str) -> RawImageSet | None:
    """The images of shards.

    Args:
        place: a folder of shards, one shard, several as `train-{0000..0099}.tar` or joined by `::`, or URLs of such.
        split: "train", or "val": None comes back where no shards are known to be for that.
        where: what to call it in messages.
        image_key: extension of the images; empty for any that is known.
        label_key: extension of the labels; empty for `cls`.

    Raises:
        DataError: a package, a shard or an image is missing, or a shard is none.
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
    gone = [url for url in urls if not is_remote(url) and not Path(url).is_file()]
    if gone:
        raise DataError(f"{where}: {len(gone)} of {len(urls)} shard(s) are not there: {shorten(gone, limit=3)}.")
    return urls


def _in_folder(root: Path, split: str, where: str) -> tuple[str, ...]:
    """The shards of a split: in a folder of its name, or with its name among the words of theirs."""
    every = {path for path in root.rglob("*") if path.is_file() and path.name.endswith((".tar", *PACKED))}
    if not every:
        raise DataError(f"{where} has no shards in it.", hint=f"Looked for .tar, {', '.join(PACKED)}.")
    words = {path: set(re.split(r"[^a-z]+", str(path.relative_to(root)).lower())) for path in every}
    train = {path for path in every if words[path] & set(TRAIN_NAMES)}
    val = {path for path in every - train if words[path] & set(VAL_NAMES)}
    if not (train and val):
        train, val = every, set()
    chosen = train if split == "train" else val
    return tuple(sorted(str(path.absolute()) for path in chosen))  # a name like `pipe:…` would be taken for a command


def _must_stream(url: str) -> bool:
    return is_remote(url) or url.endswith(PACKED)


def _stream(urls: tuple[str, ...], where: str, image_key: str, label_key: str) -> RawImageSet:
    """Shards that are read from front to back; the first image tells whether there are labels."""
    first = next(read_shard(urls[0], image_key, label_key), None)
    if first is None or first.error:
        raise DataError(f"{where}: {urls[0]}: {first.error if first else 'no images'}.", hint=_looked_for(image_key))
    return RawImageSet(where, StreamReader(urls, image_key, label_key, has_labels=first.target is not None))


def _indexed(urls: tuple[str, ...], where: str, image_key: str, label_key: str) -> RawImageSet:
    """Shards whose images are found by one walk over their headers."""
    shard: list[int] = []
    places: list[tuple[int, int]] = []
    names: list[str] = []
    targets: list[str | None] = []
    others: Counter[str] = Counter()
    for number, url in enumerate(urls):
        for name, member, target in _members(url, image_key, label_key, others):
            shard.append(number)
            places.append((member.offset_data, member.size))
            names.append(name)
            targets.append(target)
    if not names:
        found = f"; there are .{', .'.join(sorted(others))}" if others else ", nor any other file"
        raise DataError(f"{where} has no images in it{found}.", hint=_looked_for(image_key))
    offset, size = np.array(places, dtype=np.int64).T
    reader = TarReader(urls, np.array(shard, dtype=np.int32), offset, size, tuple(names))
    known = [target for target in targets if target is not None]
    if not known:
        return RawImageSet(where, reader)
    if len(known) < len(targets):
        lacking = names[targets.index(None)]
        raise DataError(
            f"{where}: {len(targets) - len(known)} of {len(targets)} images have no .{label_key}, as {lacking}."
        )
    classes = tuple(sorted(set(known)))
    position = {name: number for number, name in enumerate(classes)}
    return RawImageSet(where, reader, tuple(position[target] for target in known), classes)


def _members(
    url: str, image_key: str, label_key: str, others: Counter[str]
) -> list[tuple[str, tarfile.TarInfo, str | None]]:
    """The images of a shard and their labels; extensions that are neither are counted."""
    images: dict[str, tuple[str, tarfile.TarInfo]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(url, "r:", tarinfo=Member) as tar:
            for key, extension, member in wanted(tar, image_key, label_key, others):
                if extension == image_key if image_key else f".{extension}" in EXTENSIONS:
                    images.setdefault(key, (member.name, member))
                else:
                    labels[key] = content(tar, member).decode("utf-8", "replace").strip()
    except BROKEN as error:
        raise DataError(
            f"{url} is no whole, unpacked tar file: {error}.", hint="A packed one must be named so: .tar.gz."
        ) from error
    return [(name, member, labels.get(key)) for key, (name, member) in images.items()]


def _looked_for(image_key: str) -> str:
    every: Sequence[str] = [f".{image_key}"] if image_key else sorted(EXTENSIONS)
    return (
        f"Looked for {', '.join(every)}. Another extension: --image-key."
        if not image_key
        else f"Looked for {every[0]}."
    )
