"""Find the images of a folder, and their classes.

folder/n01440764/a.jpg   class folders: labeled by synset, --class-map, number or sorted name
folder/a.jpg             flat: unlabeled
folder/{train,val}/…     either of these, split as ImageNet is
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vitcompress.data.readers import EXTENSIONS, FileReader
from vitcompress.data.sets import TRAIN_NAMES, VAL_NAMES, RawImageSet
from vitcompress.errors import DataError, nearest


def open_folder(place: str, split: str, flag: str) -> RawImageSet | None:
    """Find the images of a folder, with the names of their class folders, if any.

    Args:
        place: path of class folders, of a flat folder of unlabeled images, or of a folder with a
            training and a validation folder.
        split: "train" for the training folder, or else the whole folder; "val" for the validation
            folder.
        flag: the flag that named the folder, for messages.

    Returns:
        The images; None if `split` is "val" and there is no validation folder.

    Raises:
        DataError: the folder is missing, empty, or mixes images and folders of images.
    """
    root = folder_at(place, flag)
    train, val = _splits(root)
    if split == "val" and val is None:
        return None
    return _images(val if split == "val" and val is not None else train, flag)


def folder_at(place: str, flag: str) -> Path:
    """Return the path of a folder that exists; the arguments are those of `open_folder`.

    Raises:
        DataError: the folder is missing, or not a folder.
    """
    root = Path(place)
    if not root.is_dir():
        neighbors = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        problem = "is not a folder" if root.exists() else f"does not exist{nearest(root.name, neighbors)}"
        raise DataError(f"{flag} {root} {problem}.", hint=_hint_other_kind(root))
    return root


def _images(root: Path, flag: str) -> RawImageSet:
    paths = tuple(_walk(root, set()))
    if not paths:
        suffixes = {path.suffix for path in root.iterdir()}
        raise DataError(
            f"{flag} {root} has no images in it.",
            hint=_hint_other_kind(root) or (f"{flag} wds:{root} reads shards." if ".tar" in suffixes else "")
            or (f"{flag} hfds:{root} reads tables." if suffixes & {".parquet", ".arrow"} else "")
            or f"Looked for {', '.join(sorted(EXTENSIONS))}.",
        )  # fmt: skip
    start = len(_prefix(root))
    folders = {_first_folder(path, start) for path in paths}
    if "" in folders:
        if len(folders) > 1:
            raise DataError(
                f"{flag} {root} holds both images and folders of images.", hint="Give class folders, or a flat folder."
            )
        return RawImageSet(str(root), FileReader(paths))
    classes = sorted(folders)
    position = {name: number for number, name in enumerate(classes)}
    targets = tuple(position[_first_folder(path, start)] for path in paths)
    return RawImageSet(str(root), FileReader(paths), targets, tuple(classes))


def _hint_other_kind(root: Path) -> str:
    if root.suffix in (".tar", ".tgz", ".gz"):
        return f"wds:{root} reads shards."
    return f"hfds:{root} reads tables." if root.suffix in (".parquet", ".arrow") else ""


def _splits(root: Path) -> tuple[Path, Path | None]:
    """Return the training and validation folders of `root`; without both, `root` and None."""
    train = next((root / name for name in TRAIN_NAMES if (root / name).is_dir()), None)
    val = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    return (train, val) if train and val else (root, None)


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Yield the path of every image below a folder, in order, following links.

    Paths are text, joined by hand, because there may be millions. Each folder is entered once, even
    if it links to itself.

    Args:
        folder: folder to search.
        seen: device and inode of each folder that was entered; extended in place.
    """
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    prefix = _prefix(folder)
    try:
        with os.scandir(folder) as entries:
            children = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError:  # no permission to read it
        return
    for name, is_folder in children:
        if is_folder:
            yield from _walk(folder / name, seen)
            continue
        dot = name.rfind(".")
        if dot > 0 and name[dot:].lower() in EXTENSIONS:
            yield prefix + name


def _prefix(folder: Path) -> str:
    """Return the start of the paths of a folder's files."""
    return str(folder / "x")[:-1]


def _first_folder(path: str, start: int) -> str:
    """Return the first folder of a path from position `start` on; "" if there is none."""
    end = path.find(os.sep, start)
    return path[start:end] if end >= 0 else ""
