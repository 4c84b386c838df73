"""Find the images of a folder, and their classes.

folder/n01440764/a.jpg   class folders, numbered by `vitcompress.data.numbering`
folder/a.jpg             flat: unlabeled
folder/{train,val}/…     either of these, split as ImageNet is
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vitcompress.data.classes import ImageClasses
from vitcompress.data.readers import EXTENSIONS, FileReader
from vitcompress.data.sets import TRAIN_NAMES, VAL_NAMES, RawImageSet
from vitcompress.errors import DataError, nearest, shorten


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
    train, val = _splits(root, flag)
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
    left_out: Counter[str] = Counter()
    paths = tuple(_walk(root, (), left_out))
    if not paths:
        suffixes = {path.suffix for path in root.iterdir()}
        raise DataError(
            f"{flag} {root} has no images in it.{_told(left_out)}",
            hint=_hint_other_kind(root) or (f"{flag} wds:{root} reads shards." if ".tar" in suffixes else "")
            or (f"{flag} hfds:{root} reads tables." if suffixes & {".parquet", ".arrow"} else "")
            or f"Looked for {', '.join(sorted(EXTENSIONS))}.",
        )  # fmt: skip
    start = len(_prefix(root))
    folders = [_first_folder(path, start) for path in paths]
    classes = tuple(sorted(set(folders)))
    if classes == ("",):
        return RawImageSet(str(root), FileReader(paths), notes=tuple(filter(None, [_told(left_out).strip()])))
    if "" in classes:
        raise DataError(
            f"{flag} {root} holds both images and folders of images.", hint="Give class folders, or a flat folder."
        )
    nested = {name for path, name in zip(paths, folders, strict=True) if os.sep in path[start + len(name) + 1 :]}
    _check_no_splits(root, flag, classes, paths)
    empty = _empty_folders(root, classes)
    notes = [_told(left_out).strip()]
    if empty:
        notes.append(f"{root}: class folders without images: {shorten(empty)}.")
    if nested:
        notes.append(f"{root}: images in folders below a class folder ({shorten(sorted(nested))}) are of its class.")
    position = {name: number for number, name in enumerate(classes)}
    targets = tuple(position[name] for name in folders)
    named = ImageClasses(classes, f"{flag} {root}", empty=empty)
    return RawImageSet(str(root), FileReader(paths), targets, named, tuple(filter(None, notes)))


def _check_no_splits(root: Path, flag: str, classes: Sequence[str], paths: Sequence[str]) -> None:
    """Make sure that no class folder is a split: one that is named so and holds folders of images.

    Raises:
        DataError: one is.
    """
    for name in classes:
        start = _prefix(root / name)
        if name.lower() not in (*TRAIN_NAMES, *VAL_NAMES):
            continue
        if all(os.sep in path[len(start) :] for path in paths if path.startswith(start)):
            raise DataError(
                f"{flag} {root} has a folder {name} with folders of images, so its folders ({shorten(classes)}) are "
                "splits, not classes.",
                hint=f"Name the folders of both splits, such as --data {root / name} --val-data DIR.",
            )


def _empty_folders(root: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of class folders without images, links to nothing among them."""
    with os.scandir(root) as entries:
        kinds = {entry.name: _kind(entry) for entry in entries if not entry.name.startswith(".")}
    folders = [name for name, kind in kinds.items() if kind and (kind == "folder" or not Path(name).suffix)]
    return tuple(sorted(set(folders) - set(classes)))


def _told(left_out: Mapping[str, int]) -> str:
    """Return a sentence on the files that were left out; empty if there are none."""
    if not left_out:
        return ""
    total = sum(left_out.values())
    parts = ", ".join(f"{count} {what}{'s' if count > 1 and what[-1] == 'k' else ''}"
                      for what, count in sorted(left_out.items()))  # fmt: skip
    return f" {total} {'file' if total == 1 else 'files'} left out: {parts}."


def _hint_other_kind(root: Path) -> str:
    if root.suffix in (".tar", ".tgz", ".gz"):
        return f"wds:{root} reads shards."
    return f"hfds:{root} reads tables." if root.suffix in (".parquet", ".arrow") else ""


def _splits(root: Path, flag: str) -> tuple[Path, Path | None]:
    """Return the training and validation folders of `root`; without any, `root` and None.

    Raises:
        DataError: two folders differ only in case.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = []
    for names in (TRAIN_NAMES, VAL_NAMES):
        matches = next((m for name in names if (m := [p for p in folders if p.name.lower() == name])), [])
        if names == TRAIN_NAMES:  # val/ and test/ beside each other are common
            matches = [path for path in folders if path.name.lower() in names]
        if len(matches) > 1:
            raise DataError(f"{flag} {root} has the folders {shorten(p.name for p in matches)}.", hint="Name one.")
        found.append(matches[0] if matches else None)
    train, val = found
    if train and val:
        return train, val
    alone = train or val
    if alone and folders == [alone] and not any(path.suffix.lower() in EXTENSIONS for path in root.iterdir()):
        return alone, None
    return root, None


def _walk(folder: Path, above: tuple[tuple[int, int], ...], left_out: Counter[str]) -> Iterator[str]:
    """Yield the path of every image below a folder, in order, following links.

    Paths are text, joined by hand, because there may be millions.

    Args:
        folder: folder to search.
        above: device and inode of each folder above, which links may lead to again.
        left_out: counts entries that are left out, by reason; extended in place.
    """
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in above:
            left_out["link to a folder above it"] += 1
            return
        with os.scandir(folder) as entries:
            children = sorted((entry.name, _kind(entry)) for entry in entries)
    except OSError as error:
        left_out[f"unreadable folder ({error.strerror})"] += 1
        return
    above, prefix = (*above, (status.st_dev, status.st_ino)), _prefix(folder)
    for name, kind in children:
        if name.startswith("."):
            if kind == "folder" or Path(name).suffix.lower() in EXTENSIONS:
                left_out["hidden"] += 1
        elif kind == "folder":
            yield from _walk(folder / name, above, left_out)
        elif kind:
            left_out[kind] += 1
        elif name[max(0, name.rfind(".")) :].lower() in EXTENSIONS:
            yield prefix + name
        else:
            left_out["of unknown type"] += 1


def _kind(entry: os.DirEntry[str]) -> str:
    """Return whether an entry is a folder or a link to nothing; empty for a file."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_symlink():
            os.stat(entry.path)
    except OSError:  # also a link to itself
        return "broken link"
    return ""


def _prefix(folder: Path) -> str:
    """Return the start of the paths of a folder's files."""
    return str(folder / "x")[:-1]


def _first_folder(path: str, start: int) -> str:
    """Return the first folder of a path from position `start` on; "" if there is none."""
    end = path.find(os.sep, start)
    return path[start:end] if end >= 0 else ""
