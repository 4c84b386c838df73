"""Models filled with the weights of a checkpoint, a folder or the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import ARCHITECTURE
from tests.factories import ARGS, VARIANTS, save_as_timm_does, tiny
from tests.pretrained.test_states import write_shards
from vitcompress.bundled import FASHION_VIT
from vitcompress.errors import CheckpointError, VitcompressError
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import data_config
from vitcompress.pretrained.load import load_pretrained
from vitcompress.pretrained.resolve import Source, resolve
from vitcompress.recipe import ModelRecipe

Weights = dict[str, Tensor]


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_built_in_model_brings_its_sizes_and_weights() -> None:
    model = load_pretrained(resolve(ModelRecipe("fashion_vit")))
    assert len(model.get_submodule("blocks")._modules) == 12
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    assert resolve(ModelRecipe("fashion_vit")).checkpoint == FASHION_VIT.checkpoint


# --- checkpoints


def parallel(weights: Weights) -> Weights:
    return {f"module.{name}": t for name, t in weights.items()}


NOISE: Weights = {"head.bias": torch.zeros(5)}
WRAPPINGS: dict[str, Callable[[Weights], Any]] = {
    "bare": lambda w: w,
    "model": lambda w: {"model": w, "epoch": 3},
    "state_dict": lambda w: {"state_dict": w, "arch": "vit"},
    "state_dict_ema": lambda w: {"state_dict": NOISE, "state_dict_ema": w},
    "no-ema": lambda w: {"state_dict": w, "state_dict_ema": None},
    "module": parallel,
    "state_dict-module": lambda w: {"state_dict": parallel(w), "optimizer": {"state": {}}},
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_checkpoint_is_found_in_its_wrapping(wrapping: str, suffix: str, tmp_path: Path) -> None:
    weights = tiny().state_dict()
    path = tmp_path / f"w{suffix}"
    torch.save(WRAPPINGS[wrapping](weights), path)
    assert same(load_pretrained(resolve(ModelRecipe(ARCHITECTURE, path, ARGS))).state_dict(), weights)


def test_a_safetensors_checkpoint_is_found_with_its_prefix(tmp_path: Path) -> None:
    weights = tiny().state_dict()
    save_file(parallel(weights), tmp_path / "w.safetensors")
    recipe = ModelRecipe(ARCHITECTURE, tmp_path / "w.safetensors", ARGS)
    assert same(load_pretrained(resolve(recipe)).state_dict(), weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_teacher_is_its_checkpoint(variant: str, tmp_path: Path) -> None:
    model = tiny(variant)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    name, args = VARIANTS[variant]
    loaded = load_pretrained(resolve(ModelRecipe(name, tmp_path / "w.safetensors", {**ARGS, **args})))
    assert same(loaded.state_dict(), model.state_dict())
    assert not loaded.training


def test_half_precision_weights_become_a_float32_teacher(tmp_path: Path) -> None:
    half = {name: t.half() for name, t in tiny().state_dict().items()}
    save_file(half, tmp_path / "w.safetensors")
    loaded = load_pretrained(resolve(ModelRecipe(ARCHITECTURE, tmp_path / "w.safetensors", ARGS))).state_dict()
    assert same(loaded, {name: t.float() for name, t in half.items()})


def test_weights_of_another_publisher_are_translated(tmp_path: Path) -> None:
    """timm converts DINOv2's checkpoints, which have other names for registers and a mask token."""
    model = tiny("registers")
    published = {name.replace("reg_token", "register_tokens"): t for name, t in model.state_dict().items()}
    published["mask_token"] = torch.zeros(1, 24)
    checkpoint = {**published, "pos_embed": torch.cat([torch.zeros(1, 1, 24), published["pos_embed"]], dim=1)}
    torch.save(checkpoint, tmp_path / "w.pth")
    name, args = VARIANTS["registers"]
    loaded = load_pretrained(resolve(ModelRecipe(name, tmp_path / "w.pth", {**ARGS, **args}))).state_dict()
    assert torch.equal(loaded["reg_token"], model.state_dict()["reg_token"])


# --- folders and the Hub


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_local_folder_brings_model_weights_and_data_config(file: str, tmp_path: Path) -> None:
    weights = tiny().state_dict()
    folder = save_as_timm_does(tmp_path / "my model #1?", weights, file=file)
    recipe = ModelRecipe(f"local-dir:{folder}")
    source = resolve(recipe)
    assert (source.name, source.architecture, source.model_args) == (recipe.model, ARCHITECTURE, ARGS)
    model = load_pretrained(source)
    assert same(model.state_dict(), weights)
    config = data_config(model, recipe)
    assert (config["mean"], config["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 0.8)


def test_a_planned_model_has_the_same_data_config_as_a_loaded_one(tmp_path: Path) -> None:
    recipe = ModelRecipe(f"local-dir:{save_as_timm_does(tmp_path / 'm', tiny().state_dict())}")
    source = resolve(recipe)
    assert data_config(empty_model(source), recipe) == data_config(load_pretrained(source), recipe)


def test_a_checkpoint_wins_over_the_folders_own(tmp_path: Path) -> None:
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict())
    other = {name: t + 1 for name, t in tiny().state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    loaded = load_pretrained(resolve(ModelRecipe(f"local-dir:{folder}", tmp_path / "other.safetensors")))
    assert same(loaded.state_dict(), other)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {name: t for name, t in w.items() if not name.startswith("head.")},
        lambda w: {**w, "extra": torch.zeros(1)},
        lambda w: {**w, "blocks.0.norm1.bias": torch.zeros(3)},
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_of_a_folder_that_do_not_fit_are_refused(change: Callable[[Weights], Weights], tmp_path: Path) -> None:
    folder = save_as_timm_does(tmp_path / "m", change(tiny().state_dict()))
    with pytest.raises(CheckpointError, match=str(folder)):
        load_pretrained(resolve(ModelRecipe(f"local-dir:{folder}")))


def test_a_file_too_small_for_its_model_is_refused_before_there_is_memory_for_it(tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    wide = {"embed_dim": 65_536, "depth": 12, "num_heads": 1}
    source = Source("vit_tiny_patch16_224", "vit_tiny_patch16_224", wide, {}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit the model: it has [\d,]+ bytes"):
        load_pretrained(source)


def test_a_teacher_is_never_left_with_a_random_head(tmp_path: Path) -> None:
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict())
    with pytest.raises(VitcompressError, match="head"):
        load_pretrained(resolve(ModelRecipe(f"local-dir:{folder}", None, {"num_classes": 7})))


def test_a_hub_model_comes_through_the_hub_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tiny().state_dict()
    folder = save_as_timm_does(tmp_path / "hub", weights)
    asked: list[tuple[str, str, str | None]] = []

    def download(repo_id: str, filename: str, revision: str | None = None, **rest: Any) -> str:
        asked.append((repo_id, filename, revision))
        return str(folder / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    recipe = ModelRecipe("hf-hub:someone/tiny@v2")
    model = load_pretrained(resolve(recipe))
    assert same(model.state_dict(), weights)
    assert data_config(model, recipe)["mean"] == (0.1, 0.2, 0.3)
    assert {(repo, revision) for repo, _, revision in asked} == {("someone/tiny", "v2")}


def from_timm(folder: Path, monkeypatch: pytest.MonkeyPatch, **args: Any) -> tuple[Weights, list[str]]:
    """Load from a folder what timm takes for its own weights; also return what is told."""
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, filename="", **__: str(folder / filename))
    told: list[str] = []
    model = load_pretrained(
        resolve(ModelRecipe(ARCHITECTURE, None, {**ARGS, "num_classes": 1000, **args})), told.append
    )
    return dict(model.state_dict()), [note.removeprefix(f"MODEL {ARCHITECTURE}: ") for note in told]


def test_published_weights_are_accounted_for_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    published = tiny(num_classes=1000).state_dict()
    save_as_timm_does(tmp_path / "m", published)
    loaded, told = from_timm(tmp_path / "m", monkeypatch)
    assert same(loaded, dict(published))
    assert told == []
    assert from_timm(tmp_path / "m", monkeypatch, img_size=48)[1] == ["position embedding resampled from 4x4 to 6x6."]
    headless, told = from_timm(tmp_path / "m", monkeypatch, num_classes=0)
    assert same(headless, {n: t for n, t in published.items() if not n.startswith("head.")})
    assert told == ["left out head.bias and 1 more: the model is built without a classifier."]
    gray, told = from_timm(tmp_path / "m", monkeypatch, in_chans=1)
    assert told == ["the patch embedding was changed from 3 to 1 channels."]
    summed = published["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    torch.testing.assert_close(gray["patch_embed.proj.weight"], summed)
    with pytest.raises(CheckpointError, match=r"missing: fc_norm\.weight"):  # timm leaves it random
        from_timm(tmp_path / "m", monkeypatch, num_classes=0, global_pool="avg")
    assert capfd.readouterr() == ("", "")


def test_a_local_folder_may_hold_shards(tmp_path: Path) -> None:
    weights = dict(tiny().state_dict())
    folder = save_as_timm_does(tmp_path / "m", weights)
    (folder / "model.safetensors").unlink()
    (folder / "s").mkdir()
    index = write_shards(folder / "shards", weights)
    for path in index.parent.iterdir():
        path.rename(folder / path.name)
    assert same(load_pretrained(resolve(ModelRecipe(f"local-dir:{folder}"))).state_dict(), weights)


def test_a_plan_needs_no_weights_in_the_folder(tmp_path: Path) -> None:
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict())
    (folder / "model.safetensors").unlink()
    source = resolve(ModelRecipe(f"local-dir:{folder}"))
    assert empty_model(source).num_classes == 5
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        load_pretrained(source)


def test_several_files_in_a_local_folder_are_not_chosen_from(tmp_path: Path) -> None:
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict(), file="first.pth")
    torch.save(tiny().state_dict(), folder / "second.pth")
    with pytest.raises(CheckpointError, match=r"several: first\.pth, second\.pth"):
        resolve(ModelRecipe(f"local-dir:{folder}"))


@pytest.mark.parametrize("model", ["hf-hub:someone/tiny", "deit_tiny"])
def test_without_a_network_the_hint_is_a_checkpoint(model: str, no_network: None) -> None:
    with pytest.raises(VitcompressError, match=model) as caught:
        load_pretrained(resolve(ModelRecipe(model)))
    assert "--checkpoint" in caught.value.hint
