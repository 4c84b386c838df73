"""Data sets that torchvision knows by name are read from the disk."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.data.opened import labels, opened, refused, seen
from tests.formats import (
    photographs,
    write_idx,
)


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
    message = r"no data set cifar11 with images and classes \(did you mean cifar10\?\)"
    refused("torch/cifar11", message, hint="flowers102")
