"""What --data and --val-data name is opened as a training and a validation set."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import draw_image
from tests.data.opened import RGB, open_folder, refused
from vitcompress.bundled import FASHION_VIT
from vitcompress.data.classes import ModelClasses
from vitcompress.data.loaders import evaluation_loader
from vitcompress.data.open import open_sets
from vitcompress.data.sets import hold_out
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe


def test_val_data_wins_over_the_folder_beside_train(images: Path, flat: Path) -> None:
    train, val = open_sets(DataRecipe(data=str(images), val_data=str(flat)), bundle=None, model=ModelClasses(5), seed=0)
    assert train is not None
    assert val is not None
    assert (len(train), val.name) == (15, str(flat))


def test_a_tenth_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    for number in range(20):
        draw_image(tmp_path / f"{number}.png", number)
    splits = [hold_out(open_folder(tmp_path, 1), seed=seed) for seed in (0, 0, 1)]
    for rest, held in splits:
        assert (len(rest), len(held)) == (18, 2)
        assert sorted(rest.indices + held.indices) == list(range(20))
    assert splits[0] == splits[1]
    assert splits[0][1].indices != splits[2][1].indices


def test_one_image_is_too_few_to_hold_any_out(tmp_path: Path) -> None:
    draw_image(tmp_path / "only.png", 0)
    with pytest.raises(DataError, match="1 image") as caught:
        open_sets(DataRecipe(data=str(tmp_path)), bundle=None, model=ModelClasses(5), seed=0)
    assert "--val-data" in caught.value.hint


def test_held_out_images_keep_their_labels(images: Path) -> None:
    train, val = open_sets(DataRecipe(data=str(images / "train")), bundle=None, model=ModelClasses(5), seed=3)
    assert train is not None
    assert val is not None
    loader = evaluation_loader(val, RGB, DataRecipe(num_workers=0))
    labels = [label for batch in loader for label in batch.labels.tolist()]
    folders = sorted(p.name for p in (images / "train").iterdir())
    assert [folders[label] for label in labels] == [Path(val.reader.where(i)).parent.name for i in val.indices]


def test_the_built_in_images_keep_training_and_test_apart() -> None:
    train, val = open_sets(DataRecipe(), bundle=FASHION_VIT, model=ModelClasses(10), seed=0)
    assert train is not None
    assert val is not None
    assert train.labels is not None
    assert set(train.labels) == set(range(10))
    assert len(train) >= 1000
    pictures = [{s.reader.open(i).tobytes() for i in s.indices} for s in (train, val)]
    assert not pictures[0] & pictures[1]


@pytest.mark.parametrize(
    ("data", "package"), [("wds:x.tar", "webdataset"), ("hfds:", "datasets")], ids=["webdataset", "datasets"]
)
def test_a_missing_extra_is_named(data: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (package, f"{package}.shardlists"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    refused(f"{data}{tmp_path}", f"needs the package {package}", hint=f"pip install 'vitcompress[{package}]'")
