"""Images and labels come out of tar shards as they went in."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import Vitcompress, draw_image
from tests.data.opened import RGB, labels, opened, pixels, refused, seen
from tests.formats import (
    CLASSES,
    jpeg,
    packed,
    photographs,
    samples,
    sparse_member,
    write_shard,
    write_shards,
)
from vitcompress.data.classes import ModelClasses
from vitcompress.data.loaders import count_unreadable, evaluation_loader
from vitcompress.data.open import open_to_evaluate
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, "set-train-{:04}.tar", shards=2, each=5)
    return write_shards(root, "set-val-{:04}.tar", shards=1, each=5)


def test_a_folder_of_shards_is_split_by_their_names(shards: Path) -> None:
    train, val = opened(f"wds:{shards}")
    assert (len(train), len(val)) == (10, 5)
    assert labels(train) == [0, 1, 2, 3, 4] * 2
    assert pixels(train) == [Image.open(io.BytesIO(jpeg(image))).tobytes() for image in photographs(10)]
    assert train.reader.where(7) == f"{shards / 'set-train-0001.tar'}:000007.jpg"


def test_a_pattern_of_shards_has_a_tenth_held_out(shards: Path) -> None:
    train, val = opened(f"wds:{shards}/set-train-{{0000..0001}}.tar")
    assert (len(train), len(val)) == (9, 1)
    assert sorted(train.indices + val.indices) == list(range(10))


def test_timms_way_to_write_a_kind_is_understood(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(opened(f"WDS/{shards}")[0]) == 10
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        draw_image(Path(f"wds/x/{number}.png"), number)
    assert opened("wds/x")[0].labels is None  # a folder of that name wins


def test_shards_are_read_at_random_alike_for_any_number_of_workers(shards: Path) -> None:
    train, _ = opened(f"wds:{shards}")
    assert all(torch.equal(a, b) for a, b in zip(seen(train, 0), seen(train, 2), strict=True))


def test_shards_without_labels_are_unlabelled(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    write_shard(tmp_path / "a.tar", samples(photographs(3)))
    assert opened(f"wds:{tmp_path}")[0].labels is None


def test_labels_of_shards_may_be_names_under_an_extension_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    members = [
        (f"{n}.{key}", data)
        for n, image in enumerate(photographs(5))
        for key, data in (("seg.png", b"no image"), ("rgb.jpg", jpeg(image)), ("species", CLASSES[4 - n].encode()))
    ]
    write_shard(tmp_path / "a.tar", members)
    train, val = opened(f"wds:{tmp_path}", image_key="rgb.jpg", label_key="species", val_data=f"wds:{tmp_path}")
    assert labels(train) == labels(val) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "no images in it and no other files"),
        ([("a.txt", b"x"), ("b.json", b"{}")], r"it has \.json, \.txt"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b"x")], r"1 of 2 images have no \.cls, for example b\.jpg"),
        ([("a.jpg", b"x"), ("a.cls", b"7")], r"has 1 class \(7\), but the model has 5 classes"),
    ],
    ids=["empty", "other-files", "a-label-is-missing", "beyond-the-classes"],
)
def test_shards_that_cannot_be_used_are_named(members: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    write_shard(tmp_path / "a.tar", members)
    refused(f"wds:{tmp_path}", message)


def test_a_shard_that_is_cut_off_is_named(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "set-train-0000.tar").read_bytes()
    for name, content in (("cut.tar", whole[: len(whole) // 2]), ("text.tar", b"no tar at all" * 100)):
        (tmp_path / name).write_bytes(content)
        refused(f"wds:{tmp_path / name}", f"{name} is not a complete, uncompressed tar file", hint=".tar.gz")


def test_a_shards_name_is_never_run_as_a_command(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(shards / "set-train-0000.tar", tmp_path / "pipe:touch ran;true .tar")
    packed(shards / "set-train-0000.tar").rename(tmp_path / "pipe:touch ran;true .tar.gz")
    monkeypatch.chdir(tmp_path)
    for place in ("wds:.", f"wds:{tmp_path}"):
        train, _ = opened(place, val_data=place)
        (batch,) = evaluation_loader(train, RGB, DataRecipe(num_workers=0))
        assert len(batch.labels) == 10
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("name", ["000000.cls", "000000.jpg"])
def test_a_shard_that_claims_more_than_it_has_is_named(name: str, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    whole = sparse_member(name, 6 << 30) + bytes(1024)
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(whole) if suffix.endswith("gz") else whole)
    refused(f"wds:{tmp_path}", f"{name} is a sparse file")
    (tmp_path / f"a.{suffix}").unlink()
    write_shard(tmp_path / f"b.{suffix}", [("0.jpg", b""), ("0.cls", b"1" * 5000)])
    refused(f"wds:{tmp_path}", "0.cls has 5,000 bytes, more than the limit of 4,096")


def test_shards_that_are_not_there_are_named(shards: Path, tmp_path: Path) -> None:
    refused(f"wds:{shards}/set-train-{{0000..0003}}.tar", r"2 of 4 shard\(s\) do not exist: .*0002\.tar")
    refused(f"wds:{tmp_path}", "has no shards in it")
    refused(str(shards), "has no images in it", hint="wds:")


def test_shards_are_compressed_with_and_evaluated_on(
    shards: Path, tmp_path: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    out = tmp_path / "mini.safetensors"
    data = ["--data", f"wds:{shards}", "--num-workers", 0, "--batch-size", 4]
    ended = vitcompress("compress", *teacher, *data, "--steps", 2, "--share", 2, "--no-baselines", "--out", out)
    assert ended.code == 0, ended.err
    report = vitcompress("report", out, "--json").out
    assert json.loads(report)["data"] == f"wds:{shards}"
    measured = vitcompress("evaluate", out, "--data", f"wds:{shards}", "--num-workers", 0, "--json")
    assert json.loads(measured.out)["num_images"] == 5


def test_samples_with_a_label_and_no_image_are_told(tmp_path: Path) -> None:
    members = samples(photographs(2), labels=[0, 1])
    members += [("000002.heic", b"x"), ("000002.cls", b"1")]
    write_shard(tmp_path / "a.tar", members)
    found = open_to_evaluate(f"wds:{tmp_path}", "--data", DataRecipe(), None, ModelClasses(2))
    assert len(found) == 2
    assert found.notes[0].endswith("samples left out, which have a label and no known image: 000002.")


def test_labels_of_shards_are_their_own_numbers(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", samples(photographs(12), labels=range(12)))
    found = open_to_evaluate(f"wds:{tmp_path}", "--data", DataRecipe(), None, ModelClasses(12))
    assert labels(found) == list(range(12))
    assert found.numbering is not None
    assert not found.numbering.others


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_images_with_dots_in_their_names_are_refused(name: str, tmp_path: Path) -> None:
    members = samples(photographs(2), labels=[0, 1])
    members += [("cat.v1.jpg", members[0][1]), ("cat.v1.cls", b"2"), ("000000.seg.png", b"a mask of the first image")]
    write_shard(tmp_path / name, members)
    message = "cat.v1.jpg is no image: from the first dot on, its extension is .v1.jpg"

    def loaded() -> None:
        found = open_to_evaluate(f"wds:{tmp_path / name}", "--data", DataRecipe(), None, ModelClasses(3))
        for batch in evaluation_loader(found, RGB, DataRecipe(num_workers=0)):
            count_unreadable(batch, skip=False)

    with pytest.raises(DataError, match=message):
        loaded()


def test_a_stream_whose_first_image_has_no_label_is_not_taken_for_unlabeled(tmp_path: Path) -> None:
    first, second = samples(photographs(2))
    write_shard(tmp_path / "a.tar.gz", [first, second, ("000001.cls", b"1")])
    found = open_to_evaluate(f"wds:{tmp_path}", "--data", DataRecipe(), None, ModelClasses(2))
    (batch,) = evaluation_loader(found, RGB, DataRecipe(num_workers=0))
    with pytest.raises(DataError, match=r"it has a label \(.cls\), and the first image of the shards has none"):
        count_unreadable(batch, skip=False)
