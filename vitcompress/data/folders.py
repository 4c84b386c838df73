"""Which images are in a folder?

folder/n01440764/a.jpg   class folders: labelled, by ImageNet synset, --class-map, number, or sorted name
folder/a.jpg             flat: unlabelled
folder/{train,val}/…     both of the above, split as ImageNet is
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vitcompress.data.readers import EXTENSIONS, FileReader
from vitcompress.data.sets import TRAIN_NAMES, VAL_NAMES, RawImageSet
from vitcompress.errors import DataError, nearest


def open_folder(place: str, split: str, flag: str) -> RawImageSet | None:
    """The images of a folder, with the names of their class folders where they lie in such.

    Args:
        place: class folders, a flat folder of unlabelled images, or a folder of a training and a validation folder.
        split: "train": the training folder, or all of it; "val": None comes back where there is no validation folder.
        flag: the option that named it, for messages.

    Raises:
        DataError: missing, not readable, or empty.
    """
    root = folder_at(place, flag)
    train, val = _splits(root)
    if split == "val" and val is None:
        return None
    return _images(val if split == "val" and val is not None else train, flag)


def folder_at(place: str, flag: str) -> Path:
    """The folder of images; its arguments are those of `open_folder`.

    Raises:
        DataError: missing, or no folder.
    """
    root = Path(place)
    if not root.is_dir():
        beside = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        what = "is not a folder" if root.exists() else f"does not exist{nearest(root.name, beside)}"
        raise DataError(f"{flag} {root} {what}.", hint=_other_kind(root))
    return root


def _images(root: Path, flag: str) -> RawImageSet:
    paths = tuple(_walk(root, set()))
    if not paths:
        kinds = {path.suffix for path in root.iterdir()}
        raise DataError(
            f"{flag} {root} has no images in it.",
            hint=_other_kind(root) or (f"{flag} wds:{root} reads shards." if ".tar" in kinds else "")
            or (f"{flag} hfds:{root} reads tables." if kinds & {".parquet", ".arrow"} else "")
            or f"Looked for {', '.join(sorted(EXTENSIONS))}.",
        )  # fmt: skip
    start = len(_inside(root))
    folders = {_first_folder(path, start) for path in paths}
    if "" in folders:
        if len(folders) > 1:
            raise DataError(
                f"{flag} {root} holds both images and folders of images.", hint="Class folders, or a flat folder."
            )
        return RawImageSet(str(root), FileReader(paths))
    classes = sorted(folders)
    position = {name: number for number, name in enumerate(classes)}
    targets = tuple(position[_first_folder(path, start)] for path in paths)
    return RawImageSet(str(root), FileReader(paths), targets, tuple(classes))


def _other_kind(root: Path) -> str:
    if root.suffix in (".tar", ".tgz", ".gz"):
        return f"wds:{root} reads shards."
    return f"hfds:{root} reads tables." if root.suffix in (".parquet", ".arrow") else ""


def _splits(root: Path) -> tuple[Path, Path | None]:
    """The training folder of `root` and, where it is laid out as ImageNet is, its validation folder."""
    train = next((root / name for name in TRAIN_NAMES if (root / name).is_dir()), None)
    val = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    return (train, val) if train and val else (root, None)


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Every image below a folder, in the order of their paths, through links too, each folder once.

    As text, name by name: there may be millions.

    Args:
        folder: where to look.
        seen: device and inode of the folders that were gone through; added to.
    """
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    inside = _inside(folder)
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError:  # not ours to read
        return
    for name, is_folder in found:
        if is_folder:
            yield from _walk(folder / name, seen)
            continue
        dot = name.rfind(".")
        if dot > 0 and name[dot:].lower() in EXTENSIONS:
            yield inside + name


def _inside(folder: Path) -> str:
    """What paths of files in a folder begin with."""
    return str(folder / "x")[:-1]


def _first_folder(path: str, start: int) -> str:
    """The first folder of a path from `start` on; "" where there is none."""
    end = path.find(os.sep, start)
    return path[start:end] if end >= 0 else ""
