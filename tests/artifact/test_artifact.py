"""Written files give the student back, share as it does, and are refused if they were altered."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.data
import torch
from safetensors import safe_open
from torch import nn

import vitcompress
from tests.artifact.helpers import HARM, manifest_of, write_stored, write_student
from tests.conftest import listing
from tests.factories import VARIANTS, compressed, images, tiny
from vitcompress.artifact import manifest
from vitcompress.artifact.read import read_manifest
from vitcompress.artifact.write import verify, write
from vitcompress.errors import ArtifactError
from vitcompress.plans.make import make_plan
from vitcompress.quantize.codecs import STORES
from vitcompress.quantize.store import stored_tensors
from vitcompress.recipe import PlanRecipe


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_model_is_the_student_to_the_last_bit(variant: str, tmp_path: Path) -> None:
    student, _ = write_student(tmp_path / "m.safetensors", variant, share=2)
    loaded = vitcompress.load(tmp_path / "m.safetensors")
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded(images(student)), student(images(student)))
    assert loaded.state_dict().keys() == student.state_dict().keys()


@pytest.mark.parametrize(
    ("recipe", "shared"),
    [
        ({"share": 2}, {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}),
        (
            {"groups": "0-1,2-3", "share_biases": True, "transforms": ()},
            {
                f"{layer}.{leaf}"
                for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
                for leaf in ("weight", "bias")
            },
        ),
    ],
)
def test_a_loaded_model_shares_by_identity(recipe: dict[str, Any], shared: set[str], tmp_path: Path) -> None:
    write_student(tmp_path / "m.safetensors", **recipe)
    blocks = vitcompress.load(str(tmp_path / "m.safetensors")).get_submodule("blocks")
    for first, second in ((0, 1), (2, 3)):
        one, two = (dict(blocks.get_submodule(str(i)).named_parameters()) for i in (first, second))
        assert {name for name in one if one[name] is two[name]} == shared
    assert blocks[0].attn.qkv.weight is not blocks[2].attn.qkv.weight  # type: ignore[index]


def test_a_loaded_model_can_be_trained(tmp_path: Path) -> None:
    student, _ = write_student(tmp_path / "m.safetensors", share=4)
    loaded = vitcompress.load(tmp_path / "m.safetensors")
    loaded(images(student)).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.parametrize("share", [1, 3, 12])
def test_each_shared_tensor_is_stored_once_under_its_donor(share: int, tmp_path: Path) -> None:
    _, plan = write_student(tmp_path / "m.safetensors", depth=12, share=share)
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        stored = {name for name in file.keys() if name.endswith("attn.qkv.weight")}  # noqa: SIM118
    assert stored == {f"blocks.{i}.attn.qkv.weight" for i in range(0, 12, share)}
    assert {f"{group.donor}.attn.qkv.weight" for group in plan.groups} == stored


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tensors_in_the_file_take_the_bytes_planned(variant: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    _, plan = write_student(path, variant, share=3)
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size - 8 - header_bytes == plan.size.student_bytes
    with safe_open(path, framework="pt") as file:
        assert sum(file.get_tensor(n).numel() for n in file.keys()) == plan.size.student_params  # noqa: SIM118


@pytest.mark.thorough
def test_loading_opens_no_connection(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert vitcompress.load(mini).num_classes == 5


def test_a_loaded_model_tells_timm_its_data_config(tmp_path: Path) -> None:
    write_student(tmp_path / "m.safetensors", "grey")
    loaded = vitcompress.load(tmp_path / "m.safetensors")
    config = timm.data.resolve_model_data_config(loaded)
    assert config["input_size"] == (1, 32, 32)
    assert config["mean"] == pytest.approx((0.5,))
    assert config["interpolation"] == "bicubic"
    assert loaded.pretrained_cfg["num_classes"] == 5  # type: ignore[index]


def test_the_header_holds_everything_under_a_version(made: Path) -> None:
    with safe_open(made / "mini.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["vitcompress"])
    assert header["format_version"] == 2
    assert header["report"] == json.loads((made / "mini.report.json").read_text())
    assert header["source"]["model_args"]["embed_dim"] == 24
    assert header["recipe"]["plan"]["share"] == 2
    assert set(header["versions"]) >= {"vitcompress", "torch", "timm", "safetensors"}
    assert len(header["source_sha256"]) == 64
    assert list(header["data_config"]["input_size"]) == [3, 32, 32]


def test_no_path_of_the_teacher_is_in_the_file(made: Path, weights: Path) -> None:
    manifest = read_manifest(made / "mini.safetensors")
    assert str(weights) not in json.dumps(manifest.source)


# --- damaged and altered files


READERS: dict[str, Callable[[Path], object]] = {"load": vitcompress.load, "read_manifest": read_manifest}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_file_is_refused(harm: str, reader: str, mini: Path) -> None:
    original = mini.read_bytes()
    mini.write_bytes(HARM[harm](original))
    assert mini.read_bytes() != original
    with pytest.raises(ArtifactError, match=r"mini\.safetensors"):
        READERS[reader](mini)


@pytest.mark.broad
@pytest.mark.parametrize("reader", READERS)
def test_every_flipped_bit_is_noticed(reader: str, mini: Path) -> None:
    original = bytearray(mini.read_bytes())
    (header_bytes,) = struct.unpack("<Q", original[:8])
    draw = random.Random(0)
    places = [*range(8), *(draw.randrange(8, 8 + header_bytes) for _ in range(150))]
    places += [draw.randrange(8 + header_bytes, len(original)) for _ in range(20)]
    for place in places:
        harmed = bytearray(original)
        harmed[place] ^= 1 << draw.randrange(8)
        mini.write_bytes(harmed)
        with pytest.raises(ArtifactError, match="mini"):
            READERS[reader](mini)


@pytest.mark.parametrize("reader", READERS)
def test_a_whole_file_of_a_future_format_asks_for_an_upgrade(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as future:
        future.setattr(manifest, "FORMAT_VERSION", 3)
        write_student(tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match="format 3") as caught:
        READERS[reader](tmp_path / "m.safetensors")
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("reader", READERS)
def test_another_safetensors_file_is_not_an_artifact(reader: str, weights: Path) -> None:
    with pytest.raises(ArtifactError, match="not one that vitcompress wrote"):
        READERS[reader](weights)


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_file_and_a_folder_are_named(reader: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.safetensors does not exist"):
        READERS[reader](tmp_path / "gone.safetensors")
    with pytest.raises(ArtifactError, match=r"is not a file|is a folder"):
        READERS[reader](tmp_path)


# --- writing


def test_a_file_that_does_not_verify_leaves_the_old_one(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(mini.parent)
    load = vitcompress.load

    def load_another(path: Path) -> nn.Module:
        model = load(path)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        return model

    monkeypatch.setattr("vitcompress.artifact.write.load", load_another)
    with pytest.raises(ArtifactError, match="logits differ"):
        write_student(mini)
    assert listing(mini.parent) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_write_leaves_the_old_file(
    interruption: type[BaseException], mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(mini.parent)

    def stop(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise interruption

    monkeypatch.setattr("vitcompress.artifact.write.save_file", stop)
    with pytest.raises(ArtifactError if interruption is OSError else interruption):
        write_student(mini)
    assert listing(mini.parent) == before


def test_a_finished_file_replaces_the_old_one_and_can_be_read_by_all(mini: Path) -> None:
    before = mini.read_bytes()
    write_student(mini, share=4)
    assert mini.read_bytes() != before
    assert list(listing(mini.parent)) == [mini.name]
    assert mini.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_never_verify(value: float) -> None:
    student = tiny()
    broken = copy.deepcopy(student)
    with torch.no_grad():
        broken.head.bias.fill_(value)  # type: ignore[operator, union-attr]
    with pytest.raises(ArtifactError):
        verify(broken, student, images(student))
    with pytest.raises(ArtifactError):
        verify(broken, broken, images(student))


def test_the_same_student_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_student(tmp_path / name, share=2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_copied_file_loads_anywhere(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(mini, tmp_path / "elsewhere" / "x.bin")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert vitcompress.load("x.bin").num_classes == 5


# --- stores


@pytest.mark.broad
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_holds_the_bytes_planned_and_gives_the_rounded_student_back(
    variant: str, store: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    teacher = tiny(variant)
    student, _ = compressed(teacher, share=3)
    plan = make_plan(teacher, PlanRecipe(share=3), name="tiny", store=store)
    write_stored(path, student, plan, variant, store)
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size - 8 - header_bytes == plan.size.student_bytes
    assert plan.size.teacher_bytes == sum(t.numel() * t.element_size() for t in teacher.state_dict().values())
    x = images(student)
    with torch.inference_mode():
        assert torch.equal(vitcompress.load(path)(x), student(x))
        assert torch.equal(vitcompress.load(path, keep_quantized=True)(x), student(x))
    assert all(p.dtype == torch.float32 for p in vitcompress.load(path).parameters())


@pytest.mark.parametrize("store", ["int8", "int4"])
def test_a_quantised_file_names_codes_and_scales_once_per_group(store: str, tmp_path: Path) -> None:
    student, plan = compressed(tiny(), share=2)
    write_stored(tmp_path / "m.safetensors", student, plan, "vit", store)
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name for name in stored if "attn.qkv.weight" in name} == {
        f"blocks.{i}.attn.qkv.weight{end}" for i in (0, 2) for end in ("", ".scale")
    }
    assert stored["blocks.0.attn.qkv.weight"].dtype == {"int8": torch.int8, "int4": torch.uint8}[store]
    for name in ("pos_embed", "norm.weight", "blocks.1.attn.mix_logits.weight", "blocks.0.mlp.token_conv.weight"):
        assert stored[name].dtype == torch.float16
    blocks: Any = vitcompress.load(tmp_path / "m.safetensors", keep_quantized=True).get_submodule("blocks")
    assert blocks[0].attn.qkv.stored_weight is blocks[1].attn.qkv.stored_weight


def test_a_student_that_was_not_rounded_does_not_verify(tmp_path: Path) -> None:
    student, plan = compressed(tiny(), share=2)
    stored = stored_tensors(student, "int8")
    int8 = dataclasses.replace(manifest_of(tiny(), plan, "vit"), store="int8")
    with pytest.raises(ArtifactError, match="logits differ"):
        write(tmp_path / "m.safetensors", student, int8, images(student), stored=stored)


def test_what_float16_cannot_hold_is_stored_as_float32(tmp_path: Path) -> None:
    student, plan = compressed(tiny(), share=2)
    with torch.no_grad():
        student.get_parameter("norm.bias")[0] = 1e5
    write_stored(tmp_path / "m.safetensors", student, plan, "vit", "int8")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert file.get_tensor("norm.bias").dtype == torch.float32
        assert file.get_tensor("norm.weight").dtype == torch.float16
    assert float(vitcompress.load(tmp_path / "m.safetensors").get_parameter("norm.bias").detach()[0]) == 1e5


def test_tensors_of_another_store_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, plan = compressed(tiny(), share=2)
    monkeypatch.setattr("vitcompress.artifact.write.verify", lambda *models: None)
    monkeypatch.setattr("vitcompress.artifact.write.load", lambda path: student)
    int4 = dataclasses.replace(manifest_of(tiny(), plan, "vit"), store="int4")
    stored = stored_tensors(student, "int8")
    write(tmp_path / "m.safetensors", student, int4, images(student), stored=stored)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match=r"tensors do not match its plan: blocks\.0\.attn\.proj\.weight"):
        vitcompress.load(tmp_path / "m.safetensors")


def test_a_file_of_format_1_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Format 1 has no field for the store."""
    with monkeypatch.context() as past:
        past.setattr(
            "vitcompress.artifact.write.to_tree",
            lambda m: {k: v for k, v in {**manifest.to_tree(m), "format_version": 1}.items() if k != "store"},
        )
        student, _ = write_student(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["vitcompress"])
    assert header["format_version"] == 1
    assert "store" not in header
    assert read_manifest(tmp_path / "m.safetensors").store == "source"
    with torch.inference_mode():
        assert torch.equal(vitcompress.load(tmp_path / "m.safetensors")(images(student)), student(images(student)))
