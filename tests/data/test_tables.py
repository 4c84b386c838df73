"""Images and labels come out of Hugging Face's tables as they went in."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.opened import RGB, labels, opened, pixels, refused, seen
from tests.formats import (
    CLASSES,
    jpeg,
    photographs,
)
from vitcompress.data.classes import ModelClasses
from vitcompress.data.loaders import evaluation_loader
from vitcompress.data.open import open_sets
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe


@pytest.fixture(scope="module")
def hf() -> Any:
    return pytest.importorskip("datasets", reason="the extra datasets is not installed")


def table(hf: Any, count: int, **columns: Any) -> Any:
    """Make a table with five named classes, not in alphabetical order."""
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(reversed(CLASSES)))})
    rows = {"image": photographs(count), "label": [n % 5 for n in range(count)]}
    return hf.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def tables(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `saved/`, `parquet/` (in the layout of the Hub) and `arrow/`, all of the same table."""
    root = tmp_path_factory.mktemp("tables")
    both = hf.DatasetDict({"train": table(hf, 10), "validation": table(hf, 5)})
    both.save_to_disk(root / "saved")
    for split, rows in both.items():
        (root / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(root / "parquet" / "data" / f"{split}-00000-of-00001.parquet")
        (root / "arrow").mkdir(exist_ok=True)
        for file in (root / "saved" / split).glob("*.arrow"):
            (root / "arrow" / f"{split}-00000-of-00001.arrow").write_bytes(file.read_bytes())
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of `datasets` in the test's folder, and the Hub offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        config = importlib.import_module("datasets.config")
    except ImportError:
        return
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("layout", ["saved", "parquet", "arrow"])
def test_a_table_gives_its_images_labels_and_splits(layout: str, tables: Path) -> None:
    train, val = opened(f"hfds:{tables / layout}")
    assert (len(train), len(val)) == (10, 5)
    assert labels(train) == [0, 1, 2, 3, 4] * 2  # the model's classes have no names here
    assert train.classes == tuple(reversed(CLASSES))
    assert pixels(train) == [image.tobytes() for image in photographs(10)]
    assert all(torch.equal(a, b) for a, b in zip(seen(train, 0), seen(train, 2), strict=True))


def test_names_of_a_tables_classes_meet_those_of_the_model(tables: Path) -> None:
    recipe = DataRecipe(data=f"hfds:{tables / 'saved'}")
    train, _ = open_sets(recipe, bundle=None, model=ModelClasses(5, CLASSES), seed=0)
    assert train is not None
    assert labels(train) == [4, 3, 2, 1, 0] * 2


def test_one_file_without_a_split_has_a_tenth_held_out(hf: Any, tmp_path: Path) -> None:
    table(hf, 10).to_parquet(tmp_path / "all.parquet")
    train, val = opened(f"hfds:{tmp_path / 'all.parquet'}")
    assert (len(train), len(val)) == (9, 1)


@pytest.mark.parametrize("rows", [[0.5, 1.5, 2.5], [[0], [0, 1], []]], ids=["numbers", "lists"])
def test_labels_that_are_no_classes_are_left_out_where_none_are_needed(
    hf: Any, rows: list[Any], tmp_path: Path
) -> None:
    """They are the targets of a regression, or the labels of a multi-label model."""
    columns = {"image": photographs(3), "label": rows}
    kind = hf.Value("float32") if isinstance(rows[0], float) else hf.Sequence(hf.Value("int64"))
    features = hf.Features({"image": hf.Image(), "label": kind})
    hf.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    recipe = DataRecipe(data=f"hfds:{tmp_path / 'saved'}")
    train, _ = open_sets(recipe, bundle=None, model=ModelClasses(0), seed=0)
    assert train is not None
    assert train.labels is None
    with pytest.raises(DataError, match="column label holds neither numbers nor names"):
        open_sets(recipe, bundle=None, model=ModelClasses(5), seed=0)


def test_a_table_of_plain_columns_needs_no_metadata(hf: Any, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [
        {"img": {"bytes": jpeg(image), "path": None}, "label": CLASSES[n]} for n, image in enumerate(photographs(5))
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    train, val = opened(f"hfds:{tmp_path}")
    assert sorted(labels(train) + labels(val)) == [0, 1, 2, 3, 4]
    evaluated = list(evaluation_loader(train, RGB, DataRecipe(num_workers=0)))
    assert [len(batch.labels) for batch in evaluated] == [4]


def test_several_columns_of_labels_have_to_be_told_apart(hf: Any, tmp_path: Path) -> None:
    kinds = {name: hf.ClassLabel(names=list(CLASSES)) for name in ("fine_label", "coarse_label")}
    rows = {"img": photographs(5), "fine_label": [0, 1, 2, 3, 4], "coarse_label": [0, 0, 0, 1, 1]}
    found = hf.Dataset.from_dict(rows, features=hf.Features({"img": hf.Image(), **kinds}))
    found.save_to_disk(tmp_path / "x")
    refused(f"hfds:{tmp_path / 'x'}", "2 columns of labels: fine_label, coarse_label", hint="--label-key")
    refused(f"hfds:{tmp_path / 'x'}", r"no column fine_labl \(did you mean fine_label\?\)", label_key="fine_labl")
    refused(f"hfds:{tmp_path / 'x'}", r"no column image \(did you mean img\?\); it has img", image_key="image")
    train, val = opened(f"hfds:{tmp_path / 'x'}", label_key="fine_label")
    assert sorted(labels(train) + labels(val)) == [0, 1, 2, 3, 4]


def test_tables_that_cannot_be_used_are_named(hf: Any, tmp_path: Path) -> None:
    hf.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "texts")
    refused(f"hfds:{tmp_path / 'texts'}", "no column of images; its columns are text", hint="--image-key")
    refused(f"hfds:{tmp_path / 'text'}", r"does not exist \(did you mean texts\?\)", hint="on this machine")
    (tmp_path / "empty").mkdir()
    refused(f"hfds:{tmp_path / 'empty'}", "has no .parquet or .arrow files")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.parquet").write_bytes(b"PAR1 and nothing more")
    refused(f"hfds:{tmp_path / 'bad'}", "cannot be read as a data set")
