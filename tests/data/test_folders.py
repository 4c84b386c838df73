"""Folders of images are read in the order of their paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import draw_image
from tests.data.opened import class_folders, open_folder
from vitcompress.data.classes import ModelClasses
from vitcompress.data.open import open_sets, open_to_evaluate
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe


def test_a_flat_folder_has_no_labels(flat: Path) -> None:
    found = open_folder(flat, 5)
    assert (found.labels, len(found)) == (None, 12)


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    draw_image(class_folders(tmp_path, "a", "b") / "stray.png", 0)
    with pytest.raises(DataError, match="both images and folders"):
        open_folder(tmp_path, 2)


def test_images_come_in_the_order_of_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "a/b.png",
        "a/b/c.png",
        "a b/c.JPG",
        "a.b/x.y.webp",
        "B/c.tiff",
        "B/.png",
        "B/._c.tiff",
        "B/.hidden/x.png",
        "B/png",
        "B/x.png.",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    paths = sorted(tmp_path / name for name in names[:5])
    found = open_folder(tmp_path, 4)
    assert [found.reader.where(index) for index in found.indices] == list(map(str, paths))
    assert found.classes == ("a", "a b", "a.b", "B")
    assert [found.classes[label] for label in found.labels or ()] == [p.relative_to(tmp_path).parts[0] for p in paths]
    monkeypatch.chdir(tmp_path)
    here = open_folder(Path(), 4)
    assert [here.reader.where(index) for index in here.indices] == [str(path.relative_to(tmp_path)) for path in paths]
    assert here.labels == found.labels
    nested = f"{tmp_path}: images in folders below a class folder (a) are of its class."
    assert found.notes == ("4 files left out: 2 hidden, 2 of unknown type.", nested)


def test_a_folder_linked_into_itself_is_not_read_again_and_again(tmp_path: Path) -> None:
    draw_image(tmp_path / "a" / "0.png", 0)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert len(open_folder(tmp_path, 1)) == 1


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("training", "validation"), ("train", "test")])
def test_a_folder_laid_out_as_imagenet_is_split(train: str, val: str, tmp_path: Path) -> None:
    class_folders(tmp_path / train, "a", "b", "c")
    class_folders(tmp_path / val, "a", "c")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    recipe = DataRecipe(data=str(tmp_path), class_map=tmp_path / "classes.txt")
    found = open_sets(recipe, bundle=None, model=ModelClasses(3), seed=0)
    assert [images.labels for images in found if images] == [(0, 1, 2), (0, 2)]
    evaluated = open_to_evaluate(str(tmp_path), "--val-data", recipe, None, ModelClasses(3))
    assert evaluated.name == str(tmp_path / val)
