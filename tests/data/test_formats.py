"""Images in shards, tables and torchvision's sets come out as they went in, with the model's labels."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import Vitcompress, draw_image
from tests.formats import (
    CLASSES,
    jpeg,
    packed,
    photographs,
    samples,
    sparse_member,
    write_idx,
    write_shard,
    write_shards,
)
from vitcompress.data.loaders import evaluation_loader, training_loader
from vitcompress.data.open import open_sets
from vitcompress.data.sets import ImageSet
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe

CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0,
}  # fmt: skip


def opened(data: str, num_classes: int | None = 5, **recipe: Any) -> tuple[ImageSet, ImageSet]:
    train, val = open_sets(DataRecipe(data=data, **recipe), bundle=None, num_classes=num_classes, seed=0)
    assert train is not None
    assert val is not None
    return train, val


def labels(images: ImageSet) -> list[int]:
    assert images.labels is not None
    return [images.labels[i] for i in images.indices]


def pixels(images: ImageSet) -> list[bytes]:
    return [images.reader.open(i).convert("RGB").tobytes() for i in images.indices]


def seen(images: ImageSet, num_workers: int) -> list[torch.Tensor]:
    recipe = DataRecipe(batch_size=4, num_workers=num_workers)
    return [batch.images for batch in training_loader(images, CONFIG, recipe, seed=1, num_steps=4)]


def refused(data: str, message: str, hint: str = "", **recipe: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(data, **recipe)
    assert hint in caught.value.hint


# --- tar shards


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
        ([], "no images in it, nor any other file"),
        ([("a.txt", b"x"), ("b.json", b"{}")], r"there are \.json, \.txt"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b"x")], r"1 of 2 images have no \.cls, as b\.jpg"),
        ([("a.jpg", b"x"), ("a.cls", b"7")], r"has 1 class \(7\), the model 5 classes"),
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
        refused(f"wds:{tmp_path / name}", f"{name} is no whole, unpacked tar file", hint=".tar.gz")


def test_a_shards_name_is_never_run_as_a_command(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(shards / "set-train-0000.tar", tmp_path / "pipe:touch ran;true .tar")
    packed(shards / "set-train-0000.tar").rename(tmp_path / "pipe:touch ran;true .tar.gz")
    monkeypatch.chdir(tmp_path)
    for place in ("wds:.", f"wds:{tmp_path}"):
        train, _ = opened(place, val_data=place)
        (batch,) = evaluation_loader(train, CONFIG, DataRecipe(num_workers=0))
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
    refused(f"wds:{tmp_path}", "0.cls has 5,000 bytes, at most 4,096")


def test_shards_that_are_not_there_are_named(shards: Path, tmp_path: Path) -> None:
    refused(f"wds:{shards}/set-train-{{0000..0003}}.tar", r"2 of 4 shard\(s\) are not there: .*0002\.tar")
    refused(f"wds:{tmp_path}", "has no shards in it")
    refused(str(shards), "has no images in it", hint="wds:")


# --- Hugging Face's tables


@pytest.fixture(scope="module")
def hf() -> Any:
    return pytest.importorskip("datasets", reason="the extra datasets is not installed")


def table(hf: Any, count: int, **columns: Any) -> Any:
    """Five named classes, in an order that is not the alphabet's."""
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(reversed(CLASSES)))})
    rows = {"image": photographs(count), "label": [n % 5 for n in range(count)]}
    return hf.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def tables(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`saved/` by save_to_disk, `parquet/` as the Hub lays it out, `arrow/` of bare files."""
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
    """What `datasets` makes of parquet goes where the test's files are; nothing is asked of the Hub."""
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
    assert labels(train) == [0, 1, 2, 3, 4] * 2  # by number: the model's classes have no names here
    assert train.classes == tuple(reversed(CLASSES))
    assert pixels(train) == [image.tobytes() for image in photographs(10)]
    assert all(torch.equal(a, b) for a, b in zip(seen(train, 0), seen(train, 2), strict=True))


def test_names_of_a_tables_classes_meet_those_of_the_model(tables: Path) -> None:
    recipe = DataRecipe(data=f"hfds:{tables / 'saved'}")
    train, _ = open_sets(recipe, bundle=None, num_classes=5, seed=0, classes=CLASSES)
    assert train is not None
    assert labels(train) == [4, 3, 2, 1, 0] * 2


def test_one_file_without_a_split_has_a_tenth_held_out(hf: Any, tmp_path: Path) -> None:
    table(hf, 10).to_parquet(tmp_path / "all.parquet")
    train, val = opened(f"hfds:{tmp_path / 'all.parquet'}")
    assert (len(train), len(val)) == (9, 1)


def test_a_table_of_plain_columns_needs_no_metadata(hf: Any, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [
        {"img": {"bytes": jpeg(image), "path": None}, "label": CLASSES[n]} for n, image in enumerate(photographs(5))
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    train, val = opened(f"hfds:{tmp_path}")
    assert sorted(labels(train) + labels(val)) == [0, 1, 2, 3, 4]
    evaluated = list(evaluation_loader(train, CONFIG, DataRecipe(num_workers=0)))
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


# --- torchvision's names


def test_a_set_that_torchvision_knows_by_name(tmp_path: Path) -> None:
    write_idx(tmp_path, train=20, test=10)
    train, val = opened(f"torch/fashion_mnist:{tmp_path}", num_classes=10)
    assert (len(train), len(val)) == (20, 10)
    assert labels(train) == list(range(10)) * 2
    assert train.classes[:2] == ("T-shirt/top", "Trouser")
    assert train.reader.open(3).tobytes() == photographs(4)[3].convert("L").resize((28, 28)).tobytes()
    assert all(torch.equal(a, b) for a, b in zip(seen(train, 0), seen(train, 2), strict=True))


def test_pets_of_torchvision_are_read_from_their_files(tmp_path: Path) -> None:
    root = tmp_path / "oxford-iiit-pet"
    lines = []
    for number, image in enumerate(photographs(4)):
        name = f"breed_{'ab'[number % 2]}_{number}"
        (root / "images").mkdir(parents=True, exist_ok=True)
        image.save(root / "images" / f"{name}.jpg")
        lines.append(f"{name} {number % 2 + 1} 1 1\n")
    (root / "annotations").mkdir()
    for split in ("trainval", "test"):
        (root / "annotations" / f"{split}.txt").write_text("".join(lines))
    train, _ = opened(f"torch:oxford_iiit_pet:{tmp_path}", num_classes=2)
    assert labels(train) == [0, 1, 0, 1]
    assert train.classes == ("Breed A", "Breed B")


def test_sets_of_torchvision_that_are_not_there_are_named(tmp_path: Path) -> None:
    refused(
        f"torch/cifar10:{tmp_path}", f"not in {tmp_path}", hint=f"CIFAR10({str(tmp_path)!r}, train=True, download=True)"
    )
    refused("torch/cifar11", r"no set cifar11 of images and classes \(did you mean cifar10\?\)", hint="flowers102")


# --- without the extras, and as a user types it


@pytest.mark.parametrize(
    ("data", "package"), [("wds:x.tar", "webdataset"), ("hfds:", "datasets")], ids=["webdataset", "datasets"]
)
def test_a_missing_extra_is_named(data: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (package, f"{package}.shardlists"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    refused(f"{data}{tmp_path}", f"needs the package {package}", hint=f"pip install 'vitcompress[{package}]'")


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
