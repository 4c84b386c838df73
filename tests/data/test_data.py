from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import draw_image
from vitcompress.bundled import FASHION_VIT
from vitcompress.data.loaders import Batch, Stream, check_readable, evaluation_loader, spare_cores, training_loader
from vitcompress.data.open import open_images, open_sets
from vitcompress.data.sets import ImageSet, hold_out
from vitcompress.data.views import Views
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe

RGB: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
}
GREY: dict[str, Any] = {**RGB, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}


def class_folders(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        draw_image(root / name / "x.png", number)
    return root


def open_folder(root: Path, num_classes: int | None, class_map: Path | None = None) -> ImageSet:
    found = open_images(str(root), "train", "--data", DataRecipe(class_map=class_map), None, num_classes)
    assert found is not None
    return found


def labels_by_folder(root: Path, num_classes: int, class_map: Path | None = None) -> dict[str, int]:
    found = open_folder(root, num_classes, class_map)
    assert found.labels is not None
    return {Path(found.reader.where(i)).relative_to(root).parts[0]: label for i, label in enumerate(found.labels)}


# --- folders and labels


@pytest.mark.parametrize(
    ("names", "num_classes", "expected"),
    [
        (("n01440764", "n02123159", "n15075141"), 1000, (0, 282, 999)),
        (("0", "3", "12"), 20, (0, 3, 12)),
        (("000", "003", "012"), 20, (0, 3, 12)),
        (("ant", "Bee", "cat"), 3, (1, 0, 2)),  # sorted by code point, as torchvision and timm do
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
        (("cat", "dog"), 5, r"2 classes \(cat, dog\), the model 5 classes"),
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
        "a.b/..png",
        "a.b/x.y.webp",
        "B/c.tiff",
        "B/.png",
        "B/png",
        "B/x.png.",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    paths = sorted(tmp_path / name for name in names[:6])
    found = open_folder(tmp_path, 4)
    assert [found.reader.where(index) for index in found.indices] == list(map(str, paths))
    assert found.classes == ("B", "a", "a b", "a.b")
    assert [found.classes[label] for label in found.labels or ()] == [p.relative_to(tmp_path).parts[0] for p in paths]
    monkeypatch.chdir(tmp_path)
    here = open_folder(Path(), 4)
    assert [here.reader.where(index) for index in here.indices] == [str(path.relative_to(tmp_path)) for path in paths]
    assert here.labels == found.labels


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
    found = open_sets(recipe, bundle=None, num_classes=3, seed=0)
    assert [images.labels for images in found if images] == [(0, 1, 2), (0, 2)]
    evaluated = open_sets(replace(recipe, data=None, val_data=str(tmp_path)), bundle=None, num_classes=3, seed=0)[1]
    assert evaluated is not None
    assert evaluated.name == str(tmp_path / val)


def test_val_data_wins_over_the_folder_beside_train(images: Path, flat: Path) -> None:
    train, val = open_sets(DataRecipe(data=str(images), val_data=str(flat)), bundle=None, num_classes=5, seed=0)
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
        open_sets(DataRecipe(data=str(tmp_path)), bundle=None, num_classes=5, seed=0)
    assert "--val-data" in caught.value.hint


def test_held_out_images_keep_their_labels(images: Path) -> None:
    train, val = open_sets(DataRecipe(data=str(images / "train")), bundle=None, num_classes=5, seed=3)
    assert train is not None
    assert val is not None
    loader = evaluation_loader(val, RGB, DataRecipe(num_workers=0))
    labels = [label for batch in loader for label in batch.labels.tolist()]
    folders = sorted(p.name for p in (images / "train").iterdir())
    assert [folders[label] for label in labels] == [Path(val.reader.where(i)).parent.name for i in val.indices]


def test_the_built_in_images_keep_training_and_test_apart() -> None:
    train, val = open_sets(DataRecipe(), bundle=FASHION_VIT, num_classes=10, seed=0)
    assert train is not None
    assert val is not None
    assert train.labels is not None
    assert set(train.labels) == set(range(10))
    assert len(train) >= 1000
    pictures = [{s.reader.open(i).tobytes() for i in s.indices} for s in (train, val)]
    assert not pictures[0] & pictures[1]


# --- views


def folder_set(root: Path) -> ImageSet:
    return open_folder(root, 5)


def seen(images: ImageSet, num_workers: int, *, seed: int = 0, steps: int = 4) -> list[torch.Tensor]:
    recipe = DataRecipe(batch_size=5, num_workers=num_workers)
    return [batch.images for batch in training_loader(images, RGB, recipe, seed=seed, num_steps=steps)]


def test_the_stream_of_views_is_the_same_for_any_number_of_workers(flat: Path) -> None:
    alone, two = (seen(folder_set(flat), workers) for workers in (0, 2))
    assert len(alone) == 4
    assert all(torch.equal(a, b) for a, b in zip(alone, two, strict=True))


def test_another_seed_gives_other_views(flat: Path) -> None:
    one, other = (seen(folder_set(flat), 0, seed=seed, steps=1)[0] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_an_image_looks_different_in_every_pass(tmp_path: Path) -> None:
    draw_image(tmp_path / "only.png", 0)
    views = seen(folder_set(tmp_path), 0, steps=1)[0]
    assert len({view.numpy().tobytes() for view in views}) == 5


def test_drawing_views_leaves_the_global_random_state_alone(flat: Path) -> None:
    views = Views(folder_set(flat), RGB, training=True, recipe=DataRecipe(), seed=0)
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    drawn = [views[0, draw] for draw in range(3)]
    assert not torch.equal(drawn[0][0], drawn[1][0])  # type: ignore[arg-type]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]


@pytest.mark.parametrize(("num_images", "batch_size"), [(1, 4), (7, 3), (8, 4), (3, 10)])
def test_every_batch_is_full_and_every_pass_sees_each_image_once(num_images: int, batch_size: int) -> None:
    steps = 3 * num_images
    batches = list(Stream(num_images, batch_size, seed=0, num_steps=steps))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    keys = [key for batch in batches for key in batch]
    assert [draw for _, draw in keys] == list(range(steps * batch_size))
    for start in range(0, len(keys) - num_images + 1, num_images):
        assert sorted(position for position, _ in keys[start : start + num_images]) == list(range(num_images))


def test_passes_come_in_different_orders() -> None:
    keys = [position for batch in Stream(50, 50, seed=0, num_steps=3) for position, _ in batch]
    assert len({tuple(keys[i : i + 50]) for i in (0, 50, 100)}) == 3


def test_a_stream_without_length_does_not_end() -> None:
    endless = iter(Stream(2, 2, seed=0, num_steps=None))
    assert Counter(len(next(endless)) for _ in range(100)) == {2: 100}


def test_evaluation_sees_every_image_once_in_order(images: Path) -> None:
    found = open_folder(images / "val", 5)
    batches = list(evaluation_loader(found, RGB, DataRecipe(batch_size=4, num_workers=0)))
    assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_an_unlabelled_image_has_label_minus_one(flat: Path) -> None:
    (batch,) = evaluation_loader(folder_set(flat), RGB, DataRecipe(num_workers=0))
    assert batch.labels.tolist() == [-1] * 12


def view_of(image: Image.Image, path: Path, kind: str, config: dict[str, Any]) -> torch.Tensor:
    """The centre crop, with values 0–1."""
    image.save(path, format=kind)
    views = Views(folder_set(path.parent), config, training=False, recipe=DataRecipe(), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view = views[0, 0].view
    assert view is not None
    return view * 0.5 + 0.5


def palette(image: Image.Image, **info: Any) -> Image.Image:
    found = image.convert("P")
    found.info.update(info)
    return found


TWO_TONE = np.repeat(np.repeat(np.array([[60, 190]], np.uint8), 32, 0), 16, 1)
BASE = Image.fromarray(TWO_TONE)
FORMS: dict[str, tuple[str, Callable[[], Image.Image]]] = {
    "grey": ("PNG", lambda: BASE),
    "rgb": ("PNG", lambda: BASE.convert("RGB")),
    "cmyk": ("TIFF", lambda: BASE.convert("RGB").convert("CMYK")),
    "palette": ("PNG", lambda: palette(BASE)),
    "palette-with-transparency": ("PNG", lambda: palette(BASE, transparency=bytes([255] * 256))),
    "grey-with-alpha": ("PNG", lambda: BASE.convert("LA")),
    "rgb-with-alpha": ("PNG", lambda: BASE.convert("RGBA")),
    "webp": ("WEBP", lambda: BASE.convert("RGB")),
    "16-bit-png": ("PNG", lambda: Image.fromarray(TWO_TONE.astype(np.uint16) * 257)),
    "16-bit-tiff": ("TIFF", lambda: Image.fromarray(TWO_TONE.astype(np.uint16) * 257)),
}


@pytest.mark.parametrize("config", [RGB, GREY], ids=["rgb-model", "grey-model"])
@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_image_gives_the_same_picture(form: str, config: dict[str, Any], tmp_path: Path) -> None:
    kind, draw = FORMS[form]
    view = view_of(draw(), tmp_path / "a.jpg", kind, config)  # the content counts: ImageNet has PNGs named .JPEG
    assert view.shape == config["input_size"]
    assert view[:, :, 4].mean() == pytest.approx(60 / 255, abs=0.03)
    assert view[:, :, 28].mean() == pytest.approx(190 / 255, abs=0.03)


def test_a_model_of_four_channels_is_refused(flat: Path) -> None:
    with pytest.raises(DataError, match="4 channels"):
        Views(folder_set(flat), {**RGB, "input_size": (4, 32, 32)}, training=False, recipe=DataRecipe(), seed=0)


def test_large_jpegs_are_decoded_no_larger_than_a_training_view_takes(tmp_path: Path) -> None:
    Image.fromarray(TWO_TONE).convert("RGB").resize((1600, 1200)).save(tmp_path / "a.jpg", quality=95)
    found = folder_set(tmp_path)
    sizes: list[tuple[int, int]] = []

    class Watched:
        def __len__(self) -> int:
            return 1

        def open(self, index: int, at_least: int = 0) -> Image.Image:
            image = found.reader.open(index, at_least)
            sizes.append(image.size)
            return image

        def where(self, index: int) -> str:
            return ""

    watched = replace(found, reader=Watched())
    for training in (True, False):
        views = Views(watched, RGB, training=training, recipe=DataRecipe(), seed=0)
        view = views[0, 0].view
        assert view is not None
        assert view.shape == (3, 32, 32)
    assert sizes == [(200, 150), (1600, 1200)]  # an eighth, of which the least crop is still larger than 32; and all


# --- workers


@pytest.mark.parametrize(("given", "expected"), [("auto", 3), (None, 3), ("2", 2), (0, 0)])
def test_workers_are_a_number_or_as_many_as_there_are_cores_to_spare(
    given: Any, expected: int, flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    loader = training_loader(folder_set(flat), RGB, DataRecipe(num_workers=given), seed=0, num_steps=1)
    assert loader.num_workers == expected


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert spare_cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert spare_cores() == 7


# --- images that cannot be read


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_no_broken_image_of_any_kind_crashes(kind: str, tmp_path: Path) -> None:
    path = draw_image(tmp_path / "a.png", 0)
    Image.open(path).save(path, format=kind)
    whole = path.read_bytes()
    views = Views(folder_set(tmp_path), RGB, training=False, recipe=DataRecipe(), seed=0)
    draw = random.Random(0)
    cuts = [whole[:n] for n in (0, 1, 10, len(whole) // 2, len(whole) - 20)]
    flips = []
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(4):
            broken[draw.randrange(min(len(whole), 200))] = draw.randrange(256)
        flips.append(bytes(broken))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in [*cuts, *flips]:
            path.write_bytes(content)
            found = views[0, 0]
            assert found.view is not None or str(path) in found.bad[0]
    path.write_bytes(cuts[3])
    assert views[0, 0].view is None


def test_a_bad_image_is_named_or_counted() -> None:
    batch = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), ("x/bad.jpg: cut short", "y.png: empty"))
    with pytest.raises(DataError, match=r"x/bad\.jpg") as caught:
        check_readable(batch, skip=False)
    assert "--skip-bad-images" in caught.value.hint
    assert check_readable(batch, skip=True) == 2
    assert check_readable(Batch(batch.images, batch.labels, ()), skip=False) == 0


def test_good_images_of_a_batch_survive_a_bad_one(tmp_path: Path) -> None:
    for number in range(3):
        draw_image(tmp_path / f"{number}.png", number)
    (tmp_path / "1.png").write_bytes(b"no image")
    (batch,) = evaluation_loader(folder_set(tmp_path), RGB, DataRecipe(num_workers=0))
    assert batch.images.shape == (2, 3, 32, 32)
    assert len(batch.bad) == 1
    assert str(tmp_path / "1.png") in batch.bad[0]
