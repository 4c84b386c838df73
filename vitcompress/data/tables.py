"""Which images are in a local data set of Hugging Face?  Parquet or arrow files, or what `save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vitcompress.data.readers import decoded
from vitcompress.data.sets import TRAIN_NAMES, VAL_NAMES, RawImageSet
from vitcompress.errors import DataError, first_line, nearest, shorten
from vitcompress.runtime.extras import require_extra

_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
_FILES = {".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class TableReader:
    """Images in a column of a table on disk, which is mapped into memory.

    Attributes:
        table: of `datasets`, with that column alone, undecoded.
        column: its name.
        name: of the table.
    """

    table: Any
    column: str
    name: str

    def __len__(self) -> int:
        return len(self.table)

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Decode image `index`."""
        cell = self.table[index][self.column]
        if cell is None:
            raise ValueError("there is no image")
        return decoded(cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]), at_least)

    def where(self, index: int) -> str:
        """The table's name and the row."""
        return f"{self.name}[{index}]"


def open_table(place: str, split: str, where: str, image_key: str, label_key: str) -> RawImageSet | None:
    """The images of a split.

    Args:
        place: a folder, or one file.
        split: "train": that split, or the only one; "val": None comes back where there is none beside it.
        where: what to call it in messages.
        image_key: the column of the images; empty for the one there is.
        label_key: the column of the labels; empty for `label`, or the one there is.

    Raises:
        DataError: a package, a file or a column is missing.
    """
    root = Path(place)
    if not root.exists():
        beside = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(
            f"{where} does not exist{nearest(root.name, beside)}.", hint="It must be a folder on this machine."
        )
    require_extra("datasets", where, DataError)
    import datasets

    splits = _load(datasets, root, where)
    name = _split_name(splits, split)
    if name is None:
        return None
    table = splits[name]
    column = _image_column(datasets, table, where, image_key)
    if len(table) == 0:
        raise DataError(f"{where} ({name}) has no rows.")
    images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    title = where if len(splits) == 1 else f"{where} ({name})"
    targets, classes = _labels(datasets, table, where, label_key)
    return RawImageSet(title, TableReader(images, column, title), targets, classes)


def _load(datasets: Any, root: Path, where: str) -> Mapping[str, Any]:
    """The tables of a folder or file, by split."""
    try:
        if any((root / name).is_file() for name in _SAVED):
            found = datasets.load_from_disk(str(root))
        elif root.is_file():
            if root.suffix not in _FILES:
                raise DataError(f"{where} is no file of {' or '.join(_FILES)}.")
            found = datasets.load_dataset(_FILES[root.suffix], data_files=str(root))
        elif not any(path.suffix in _FILES for path in root.rglob("*")):
            raise DataError(
                f"{where} has no {' or '.join(_FILES)} files in it.",
                hint="A folder of images is --data DIR, without hfds:.",
            )
        else:
            found = datasets.load_dataset(str(root))
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{where} cannot be read as a data set: {first_line(error)}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _split_name(splits: Mapping[str, Any], split: str) -> str | None:
    train = next((name for name in TRAIN_NAMES if name in splits), None)
    val = next((name for name in VAL_NAMES if name in splits), None)
    if split == "val":
        return val if len(splits) > 1 else None
    return train or next(iter(splits))


def _image_column(datasets: Any, table: Any, where: str, wanted: str) -> str:
    features = table.features
    if wanted:
        if wanted not in features:
            raise DataError(
                f"{where} has no column {wanted}{nearest(wanted, features)}; it has {shorten(features)}.",
                hint="--image-key",
            )
        return wanted
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    # without Hugging Face's metadata a parquet file has its images as {bytes, path}, or as bytes
    found = found or [name for name in ("image", "img") if name in features]
    if len(found) != 1:
        what = f"has {len(found)} columns of images" if found else "has no column of images"
        raise DataError(f"{where} {what}; its columns are {shorten(features)}.", hint="Name one with --image-key.")
    return str(found[0])


def _labels(datasets: Any, table: Any, where: str, wanted: str) -> tuple[Sequence[int] | None, tuple[str, ...]]:
    """Of each row the position of its class, and the names of the classes."""
    features = table.features
    if wanted and wanted not in features:
        raise DataError(
            f"{where} has no column {wanted}{nearest(wanted, features)}; it has {shorten(features)}.",
            hint="--label-key",
        )
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    column = wanted or ("label" if "label" in features else "")
    if not column and len(named) > 1:
        raise DataError(
            f"{where} has {len(named)} columns of labels: {shorten(named)}.", hint="Name one with --label-key."
        )
    column = column or (named[0] if named else "")
    if not column:
        return None, ()
    values = list(table.select_columns([column])[:][column])
    lacking = [value is None or value == -1 for value in values]
    if all(lacking):  # test sets of the Hub
        return None, ()
    if any(lacking):
        raise DataError(f"{where}: {sum(lacking)} of {len(values)} rows have no {column}.")
    if isinstance(features[column], datasets.ClassLabel):
        return values, tuple(features[column].names)
    if not all(isinstance(value, (int, str)) for value in values):
        raise DataError(f"{where}: column {column} holds neither numbers nor names of classes.", hint="--label-key")
    names = sorted(set(values))
    position = {value: number for number, value in enumerate(names)}
    return [position[value] for value in values], tuple(map(str, names))
