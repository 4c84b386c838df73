"""Folders of images are read in the order of their paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image, features

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


def test_what_is_left_out_of_a_folder_is_counted(tmp_path: Path) -> None:
    root = class_folders(tmp_path, "a", "b")
    (root / "a" / "loop").symlink_to(root / "a" / "loop")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "a" / "._x.png").touch()
    (root / "b" / "notes.txt").touch()
    (root / "b" / "up").symlink_to(root)
    (root / "c").symlink_to(tmp_path / "nowhere")
    (root / "d").mkdir()
    found = open_folder(root, 2)
    assert (len(found), found.classes, found.empty) == (2, ("a", "b"), ("c", "d"))
    assert found.notes == (
        "6 files left out: 3 broken links, 1 hidden, 1 link to a folder above it, 1 of unknown type.",
        f"{root}: class folders without images: c, d.",
    )


def test_a_class_folder_may_be_a_link_to_another(tmp_path: Path) -> None:
    root = class_folders(tmp_path, "a")
    (root / "b").symlink_to(root / "a")
    assert open_folder(root, 2).labels == (0, 1)


@pytest.mark.parametrize("extension", ["jfif", "jpe", "pgm", "avif", "jp2", "JPG"])
def test_less_common_types_are_read(extension: str, tmp_path: Path) -> None:
    if extension == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    picture = Image.new("L", (8, 8), 200)
    formats = {"jfif": "JPEG", "jpe": "JPEG", "pgm": "PPM", "avif": "AVIF", "jp2": "JPEG2000", "JPG": "JPEG"}
    picture.save(tmp_path / f"x.{extension}", formats[extension])
    found = open_folder(tmp_path, 2)
    assert found.reader.open(0).convert("L").getpixel((4, 4)) == pytest.approx(200, abs=3)


def test_a_folder_that_cannot_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path, "a", "b")
    scandir = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("vitcompress.data.folders.os.scandir", denied)
    found = open_folder(root, 2)
    assert found.notes[0] == "1 file left out: 1 unreadable folder (Permission denied)."
    assert found.empty == ("b",)


def test_splits_of_unknown_names_are_not_classes(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", "a", "b")
    class_folders(tmp_path / "dev", "a", "b")
    with pytest.raises(DataError, match=r"\(dev, train\) are splits, not classes"):
        open_folder(tmp_path, 2)


@pytest.mark.parametrize("split", ["train", "Test"])
def test_a_split_alone_is_no_class(split: str, tmp_path: Path) -> None:
    assert open_folder(class_folders(tmp_path / split, "a", "b").parent, 2).classes == ("a", "b")


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    assert open_folder(class_folders(tmp_path, "car", "train"), 2).classes == ("car", "train")


def test_splits_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    for split in ("train", "Train", "val"):
        class_folders(tmp_path / split, "a", "b")
    with pytest.raises(DataError, match="has the folders Train, train"):
        open_folder(tmp_path, 2)


def test_two_training_splits_are_refused(tmp_path: Path) -> None:
    for split in ("train", "training", "val"):
        class_folders(tmp_path / split, "a", "b")
    with pytest.raises(DataError, match="has the folders train, training"):
        open_folder(tmp_path, 2)
