"""Loading keeps one copy of each shared matrix and copes with files that change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import vitcompress
from tests.artifact.helpers import write_student
from tests.benchmarks import loading
from tests.factories import images
from vitcompress.artifact import manifest, tensorfile
from vitcompress.artifact.read import read_manifest
from vitcompress.errors import ArtifactError
from vitcompress.pretrained.build import build_model, empty_model
from vitcompress.pretrained.resolve import Source


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the resident set and its peak")
def test_memory_holds_one_copy_of_each_shared_matrix(tmp_path: Path) -> None:
    """A process grows by little more than the file; twelve copies take 340 MB, two of all 70 MB."""
    path = tmp_path / "m.safetensors"
    loading.make(path, "deit_base_patch16_224", 12, "source", None)
    grown = loading.memory(path, "deit_base_patch16_224", "ours")
    size = path.stat().st_size
    assert size < 36e6
    assert 0.8 * size < grown["held"] < size + 12e6
    assert grown["peak"] < size + 16e6


def test_every_tensor_lies_on_torchs_alignment(tmp_path: Path) -> None:
    """Otherwise kernels round differently, and outputs differ in the last bit."""
    write_student(tmp_path / "m.safetensors", share=2)
    with tensorfile.open_tensors(tmp_path / "m.safetensors") as file:
        starts = {place.start % 64 for place in file.places.values()}
        assert len(starts) > 1
        assert {file.tensor(name).data_ptr() % 64 for name in file.places} == {0}


def test_a_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    student, _ = write_student(path)
    loaded = vitcompress.load(path)
    with path.open("r+b") as file:
        file.truncate(100)
    with torch.inference_mode():
        assert torch.equal(loaded(images(student)), student(images(student)))


@pytest.mark.parametrize("reader", [vitcompress.load, read_manifest])
def test_a_file_that_shrinks_while_it_is_read_is_named(
    reader: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    write_student(path)
    parse = manifest.parse_header

    def shrink(*args: object) -> object:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 50_000)
        return parse(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("vitcompress.artifact.read.parse_header", shrink)
    with pytest.raises(ArtifactError, match=r"m\.safetensors was cut short while it was read"):
        reader(path)  # type: ignore[operator]


def test_no_tensor_is_read_before_the_plan_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    write_student(path)
    monkeypatch.setattr(tensorfile.TensorFile, "tensor", lambda self, name: pytest.fail("it was read"))
    monkeypatch.setattr("vitcompress.artifact.load.layout", lambda model, store: {})
    with pytest.raises(ArtifactError, match="tensors do not match its plan"):
        vitcompress.load(path)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swinv2_tiny_window8_256", "beit_base_patch16_224", "eva02_tiny_patch14_224"]
)
def test_a_model_built_without_numbers_has_the_shapes_of_one_with_them(name: str) -> None:
    args = {"depths": [1, 1], "num_heads": [2, 4]} if "swin" in name else {"depth": 1}
    source = Source(name, name, {**args, "embed_dim": 48})
    empty, full = empty_model(source), build_model(source)
    assert {n: (t.shape, t.dtype) for n, t in full.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in empty.state_dict().items()
    }
    assert all(t.is_meta for t in empty.state_dict().values())
    assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in full.parameters()]
