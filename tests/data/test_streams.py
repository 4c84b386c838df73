"""Streamed shards give the same images for any number of workers, from any step on."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.conftest import Vitcompress
from tests.formats import packed, photographs, samples, write_shard, write_shards
from vitcompress.data.calibration import calibration_batches, draw_calibration, draw_images
from vitcompress.data.classes import ModelClasses
from vitcompress.data.loaders import Batch, ShuffledBatches, count_unreadable, evaluation_loader, training_loader
from vitcompress.data.open import open_sets
from vitcompress.data.sets import ImageSet
from vitcompress.data.streams import StreamReader
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe

pytest.importorskip("webdataset", reason="the extra webdataset is not installed")

CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0,
}  # fmt: skip
SHARDS, EACH = 5, 6  # four lanes, one of them with two shards


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_shards(tmp_path_factory.mktemp("packed"), "train-{}.tar", shards=SHARDS, each=EACH)
    for path in list(folder.glob("*.tar")):
        packed(path)
        path.unlink()
    return folder


def opened(data: str, num_classes: int | None = 5, **recipe: Any) -> tuple[ImageSet, ImageSet]:
    train, val = open_sets(DataRecipe(data=data, **recipe), bundle=None, model=ModelClasses(num_classes), seed=0)
    assert train is not None
    assert val is not None
    return train, val


def everything(root: Path) -> ImageSet:
    return opened(f"wds:{root}", val_data=f"wds:{root}")[0]


def loader(images: ImageSet, num_workers: int = 0, steps: int = 9, **recipe: Any) -> DataLoader[Batch]:
    found = DataRecipe(batch_size=4, num_workers=num_workers, **recipe)
    return training_loader(images, CONFIG, found, seed=3, num_steps=steps)


def test_the_stream_is_the_same_for_any_number_of_workers(root: Path) -> None:
    none, one, two = (list(loader(everything(root), workers)) for workers in (0, 1, 2))
    assert len(none) == 9
    for other in (one, two):
        for a, b in zip(none, other, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)


def test_it_can_be_taken_up_at_any_batch(root: Path) -> None:
    whole = list(loader(everything(root)))
    views: Any = loader(everything(root)).dataset
    for start in (8, 3, 5):  # also backwards
        batch = [views[key] for key in list(ShuffledBatches(None, 4, seed=3, num_steps=9))[start]]
        assert torch.equal(torch.stack([sample.view for sample in batch]), whole[start].images)


def test_processes_that_take_batches_in_turn_see_each_image_once_a_pass(root: Path) -> None:
    names: list[set[str]] = []
    for process in range(2):
        reader = everything(root).reader
        assert isinstance(reader, StreamReader)
        reader = replace(reader, block=3, seed=1)
        batches = range(process, 8, 2)  # two batches of each of 4 lanes
        names.append({reader.where(3 * batch + i) for batch in batches for i in range(3)})
    assert [len(found) for found in names] == [12, 12]
    assert not names[0] & names[1]


def test_a_lane_gives_every_image_once_a_pass_in_another_order(root: Path) -> None:
    reader = everything(root).reader
    assert isinstance(reader, StreamReader)
    first = replace(reader, seed=2).in_lane(0)  # a lane of two shards
    passes = [[sample.where for sample in islice(first, 2 * EACH)] for _ in range(2)]
    assert len(set(passes[0])) == 2 * EACH
    assert Counter(passes[0]) == Counter(passes[1])
    assert passes[0] != passes[1]


def test_labels_come_with_the_images(root: Path) -> None:
    images = everything(root)
    for batch in loader(images):
        assert set(batch.labels.tolist()) <= set(range(5))
    assert images.labels is not None
    index = next(n for n in range(50) if images.reader.where(n).endswith("000008.jpg"))
    assert images.label(index) == 8 % 5


def test_repeated_augmentation_repeats_images_of_a_stream(root: Path) -> None:
    views = loader(everything(root), repeats=2)
    keys = next(iter(views.batch_sampler))  # type: ignore[arg-type]
    assert keys == [(0, 0), (0, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_of_a_stream_once(workers: int, root: Path) -> None:
    batches = list(evaluation_loader(everything(root), CONFIG, DataRecipe(batch_size=7, num_workers=workers)))
    assert [len(batch.labels) for batch in batches] == [7, 7, 7, 7, 2]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [n % 5 for n in range(SHARDS * EACH)]


def test_whole_shards_are_held_out(root: Path) -> None:
    train, val = opened(f"wds:{root}")
    assert isinstance(train.reader, StreamReader)
    assert isinstance(val.reader, StreamReader)
    assert (len(train.reader.urls), len(val.reader.urls)) == (SHARDS - 1, 1)
    assert not set(train.reader.urls) & set(val.reader.urls)
    assert sum(len(b.labels) for b in evaluation_loader(val, CONFIG, DataRecipe(num_workers=0))) == EACH


def test_calibration_draws_other_images_after_the_first(root: Path) -> None:
    images, recipe = everything(root), DataRecipe(num_workers=0)
    parts = [
        torch.cat(list(calibration_batches(draw_images(images, 10, seed=1, after=n), CONFIG, recipe))) for n in (0, 10)
    ]
    assert [len(part) for part in parts] == [10, 10]
    assert len({view.numpy().tobytes() for part in parts for view in part}) == 20
    again = torch.cat(list(calibration_batches(draw_images(images, 10, seed=1), CONFIG, recipe)))
    assert torch.equal(again, parts[0])


@pytest.mark.parametrize(("count", "fitted", "judged"), [(None, 23, 7), (10, 10, 20)])
def test_calibration_counts_the_images_of_a_stream(root: Path, count: int | None, fitted: int, judged: int) -> None:
    images, recipe = everything(root), DataRecipe(num_workers=0)
    drawing = draw_calibration(images, count, seed=1)
    parts = [
        torch.cat(list(calibration_batches(drawing.chosen(images, positions), CONFIG, recipe)))
        for positions in (drawing.fitted, drawing.judged)
    ]
    assert [len(part) for part in parts] == [fitted, judged]
    assert len({view.numpy().tobytes() for part in parts for view in part}) == SHARDS * EACH
    (first, *_) = calibration_batches(drawing.others(images, 3), CONFIG, recipe)  # they begin anew at the end
    assert len(first) == 3


def test_a_command_can_be_the_source(root: Path) -> None:
    shard = shlex.quote(str(root / "train-0.tar.gz"))
    data = f"wds:pipe:cat {shard}"
    found = evaluation_loader(opened(data, val_data=data)[0], CONFIG, DataRecipe(num_workers=0))
    assert sum(len(batch.labels) for batch in found) == EACH


@pytest.mark.parametrize(
    ("command", "message"),
    [("false", "exit 1"), ("echo no tar", "cannot be read"), ("tar -c -T /dev/null", "no images")],
)
def test_a_stream_that_gives_nothing_is_named(command: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(f"wds:pipe:{command}")


def test_a_shard_that_is_cut_off_or_of_other_classes_is_counted_like_an_unreadable_image(tmp_path: Path) -> None:
    whole = packed(write_shard(tmp_path / "a.tar", samples(photographs(8), labels=[0, 1, 2, 9, 0, 1, 2, 3])))
    (tmp_path / "a.tar").unlink()
    (tmp_path / "b.tar.gz").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    images = everything(tmp_path)
    (batch,) = evaluation_loader(images, CONFIG, DataRecipe(num_workers=0))
    assert any("'9' (.cls) is not a class of the model" in text for text in batch.bad)
    assert any("b.tar.gz: the shard cannot be read" in text for text in batch.bad)
    with pytest.raises(DataError, match="Unreadable image"):
        count_unreadable(batch, skip=False)
    assert len(batch.labels) >= 7 + 2


def test_a_stream_of_named_classes_needs_a_class_map_where_the_model_has_none(tmp_path: Path) -> None:
    packed(write_shard(tmp_path / "a.tar", samples(photographs(2), labels=["cat", "dog"])))
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    data = f"wds:{tmp_path}/a.tar.gz"
    with pytest.raises(DataError, match="so its classes are not known in advance"):
        opened(data, num_classes=None, val_data=data)
    train, _ = opened(data, num_classes=None, val_data=data, class_map=tmp_path / "classes.txt")
    (batch,) = evaluation_loader(train, CONFIG, DataRecipe(num_workers=0))
    assert (batch.labels.tolist(), train.classes) == ([1, 0], ("dog", "cat"))


def test_epochs_of_a_stream_are_refused_and_steps_are_not(
    root: Path, tmp_path: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    words = ["compress", *teacher, "--data", f"wds:{root}", "--share", 2, "--num-workers", 1, "--batch-size", 4]
    words += ["--no-baselines", "--out", tmp_path / "mini.safetensors"]
    ended = vitcompress(*words, "--epochs", 1)
    assert (ended.code, "--epochs 1" in ended.err, "--steps" in ended.err) == (2, True, True)
    ended = vitcompress(*words, "--steps", 2)
    assert ended.code == 0, ended.err
