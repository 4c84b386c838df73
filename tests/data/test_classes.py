"""Class names of images become class indices of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.opened import class_folders, open_folder
from vitcompress.errors import DataError


def labels_by_folder(root: Path, num_classes: int, class_map: Path | None = None) -> dict[str, int]:
    found = open_folder(root, num_classes, class_map)
    assert found.labels is not None
    return {Path(found.reader.where(i)).relative_to(root).parts[0]: label for i, label in enumerate(found.labels)}


@pytest.mark.parametrize(
    ("names", "num_classes", "expected"),
    [
        (("n01440764", "n02123159", "n15075141"), 1000, (0, 282, 999)),
        (("0", "3", "12"), 20, (0, 3, 12)),
        (("000", "003", "012"), 20, (0, 3, 12)),
        (("ant", "Bee", "cat"), 3, (0, 1, 2)),  # natural order, as timm
        (("n02123159", "n01440764"), 2, (1, 0)),  # synsets, but no ImageNet model
    ],
    ids=["synsets", "numbers", "padded-numbers", "sorted-names", "synsets-of-a-small-model"],
)
def test_class_folders_get_the_indices_of_the_model(
    names: tuple[str, ...], num_classes: int, expected: tuple[int, ...], tmp_path: Path
) -> None:
    found = labels_by_folder(class_folders(tmp_path, *names), num_classes)
    assert found == dict(zip(names, expected, strict=True))


def test_a_class_map_wins_over_every_other_mapping(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "images", "0", "1", "2")
    (tmp_path / "classes.txt").write_text("2\n1\n0\n")
    assert labels_by_folder(root, 3, tmp_path / "classes.txt") == {"0": 2, "1": 1, "2": 0}


@pytest.mark.parametrize(
    ("names", "num_classes", "message"),
    [
        (("n01440764", "n00000000", "n99999999"), 1000, "n00000000, n99999999"),
        (("cat", "dog"), 5, r"2 classes \(cat, dog\), but the model has 5 classes"),
        (("0", "5"), 5, "2 classes"),
        (("n01440764", "cat"), 1000, "2 classes"),
    ],
)
def test_class_folders_that_match_no_mapping_are_named(
    names: tuple[str, ...], num_classes: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_folder(class_folders(tmp_path, *names), num_classes)
    assert "--class-map" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n", "not in --class-map .*: dog"),
        (b"a\nb\nc\ncat\ndog\n", "beyond the model's 4 classes: dog"),
        (b"", "not in --class-map .*: cat, dog"),
        (b"\xff\xfe\x00cat", "--class-map"),
    ],
    ids=["a-folder-is-missing", "beyond-the-classes", "empty", "no-text"],
)
def test_a_class_map_that_does_not_fit_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "images", "cat", "dog")
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_folder(root, 4, tmp_path / "classes.txt")


def test_a_class_map_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--class-map .*gone\.txt"):
        open_folder(class_folders(tmp_path, "a"), 1, tmp_path / "gone.txt")
