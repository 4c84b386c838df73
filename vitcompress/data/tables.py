"""Find the images of a local Hugging Face data set: parquet, arrow or `save_to_disk` files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vitcompress.data.classes import ImageClasses
from vitcompress.data.readers import decode
from vitcompress.data.sets import TRAIN_NAMES, VAL_NAMES, RawImageSet
from vitcompress.errors import DataError, first_line, nearest, shorten
from vitcompress.runtime.caches import cache_hint
from vitcompress.runtime.extras import require_extra

_SAVED = ("dataset_dict.json", "state.json")  # written by save_to_disk
_FILES = {".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class TableReader:
    """Images in a column of a table on disk, mapped into memory.

    Attributes:
        table: a `datasets.Dataset` with only this column, undecoded.
        column: name of the column.
        name: name of the table.
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
            raise ValueError("the row has no image")
        return decode(cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]), at_least)

    def where(self, index: int) -> str:
        """Return the table's name and the number of the row."""
        return f"{self.name}[{index}]"


def open_table(place: str, split: str, where: str, image_key: str, label_key: str) -> RawImageSet | None:
    """Find the images of a split.

    Args:
        place: path of a folder or of one file.
        split: "train" for the training split, or else the first one; "val" for the validation
            split.
        where: name of the data set in messages.
        image_key: column of the images; empty for the only column of images.
        label_key: column of the labels; empty for `label`, or else the only column of labels.

    Returns:
        The images; None if `split` is "val" and there is no validation split.

    Raises:
        DataError: the package, a file or a column is missing.
    """
    root = Path(place)
    if not root.exists():
        neighbors = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(
            f"{where} does not exist{nearest(root.name, neighbors)}.", hint="It must be a folder on this machine."
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
    if label_key:
        _check_column(table.features, where, label_key, "--label-key")
    reader = TableReader(images, column, title)
    try:
        return RawImageSet(title, reader, *_labels(datasets, table, where, label_key))
    except DataError as error:  # a model whose outputs are no classes does not need them
        return RawImageSet(title, reader, label_fault=error)


def _load(datasets: Any, root: Path, where: str) -> Mapping[str, Any]:
    """Load the tables of a folder or file, by split."""
    try:
        if any((root / name).is_file() for name in _SAVED):
            loaded = datasets.load_from_disk(str(root))
        elif root.is_file():
            if root.suffix not in _FILES:
                raise DataError(f"{where} is not a {' or '.join(_FILES)} file.")
            loaded = datasets.load_dataset(_FILES[root.suffix], data_files=str(root))
        elif not any(path.suffix in _FILES for path in root.rglob("*")):
            raise DataError(
                f"{where} has no {' or '.join(_FILES)} files in it.",
                hint="For a folder of images, give --data DIR, without hfds:.",
            )
        else:
            loaded = datasets.load_dataset(str(root))
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{where} cannot be read as a data set: {first_line(error)}", hint=cache_hint(error)) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _split_name(splits: Mapping[str, Any], split: str) -> str | None:
    train, val = (
        next((name for known in names for name in splits if name.lower() == known), None)
        for names in (TRAIN_NAMES, VAL_NAMES)
    )
    if split == "val":
        return val if len(splits) > 1 else None
    return train or next(iter(splits))


def _image_column(datasets: Any, table: Any, where: str, image_key: str) -> str:
    features = table.features
    if image_key:
        _check_column(features, where, image_key, "--image-key")
        return image_key
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    # without Hugging Face's metadata, images in parquet files are {bytes, path}, or bytes
    columns = columns or [name for name in ("image", "img") if name in features]
    if len(columns) != 1:
        count = f"{len(columns)} columns" if columns else "no column"
        raise DataError(
            f"{where} has {count} of images; its columns are {shorten(features)}.", hint="Name one with --image-key."
        )
    return str(columns[0])


def _check_column(features: Any, where: str, column: str, flag: str) -> None:
    if column not in features:
        raise DataError(
            f"{where} has no column {column}{nearest(column, features)}; it has {shorten(features)}.",
            hint=f"Name one with {flag}.",
        )


def _labels(datasets: Any, table: Any, where: str, label_key: str) -> tuple[Sequence[int] | None, ImageClasses | None]:
    """Return the position of each row's class among the classes, and these."""
    features = table.features
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    column = label_key or ("label" if "label" in features else "")
    if not column and len(named) > 1:
        raise DataError(
            f"{where} has {len(named)} columns of labels: {shorten(named)}.", hint="Name one with --label-key."
        )
    column = column or (named[0] if named else "")
    if not column:
        return None, None
    values = list(table.select_columns([column])[:][column])
    missing = [value is None or value == -1 for value in values]
    if all(missing):  # test sets on the Hub
        return None, None
    if any(missing):
        raise DataError(f"{where}: {sum(missing)} of {len(values)} rows have no {column}.")
    if isinstance(features[column], datasets.ClassLabel):
        names = tuple(features[column].names)
        return values, ImageClasses(names, where, "labels", tuple(range(len(names))), named=True)
    if not all(isinstance(value, (int, str)) for value in values):
        raise DataError(
            f"{where}: column {column} holds neither numbers nor names of classes.",
            hint="Name another column with --label-key.",
        )
    found = sorted(set(values))
    position = {value: number for number, value in enumerate(found)}
    numbers = tuple(found) if all(isinstance(value, int) for value in found) else None
    classes = ImageClasses(tuple(map(str, found)), where, "labels", numbers)
    return [position[value] for value in values], classes
