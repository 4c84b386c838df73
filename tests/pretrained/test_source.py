from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import ARCHITECTURE
from tests.factories import ARGS, VARIANTS, save_as_timm_does, tiny
from vitcompress.bundled import FASHION_VIT
from vitcompress.errors import CheckpointError, ModelError, VitcompressError
from vitcompress.families.find import FAMILIES, family_of
from vitcompress.pretrained.inputs import data_config
from vitcompress.pretrained.short_names import SHORT_NAMES
from vitcompress.pretrained.source import Source, empty_model, load_teacher, resolve
from vitcompress.recipe import ModelRecipe
from vitcompress.recipe.compose import build

Weights = dict[str, Tensor]


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- names


@pytest.mark.parametrize("short", SHORT_NAMES)
def test_a_short_name_is_a_model_that_can_be_compressed(short: str) -> None:
    found = resolve(ModelRecipe(short))
    assert timm.is_model(found.architecture)
    assert found.name == found.architecture == SHORT_NAMES[short]
    assert family_of(empty_model(found), short) in FAMILIES


@pytest.mark.parametrize(
    ("typed", "architecture"),
    [
        ("deit_base_patch16_224", "deit_base_patch16_224"),
        ("deit_base", "deit_base_patch16_224"),
        ("vit_base", "vit_base_patch16_224"),
        ("deit3_hu", "deit3_huge_patch14_224"),
        ("deit_tiny.fb_in1k", "deit_tiny_patch16_224.fb_in1k"),
        ("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k"),
    ],
    ids=["exact", "short", "short-before-prefix", "prefix", "short-with-tag", "tag"],
)
def test_a_name_means_one_architecture(typed: str, architecture: str) -> None:
    assert resolve(ModelRecipe(typed)) == Source(architecture, architecture)


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        (
            "deit_smal",
            r"MODEL deit_smal could be any of: deit_small_distilled_patch16_224, deit_small_patch16_224",
            "more",
        ),
        ("vit_", r"could be any of: .* \(\d+ more\)", "Type more"),
        ("diet_base", "MODEL diet_base is unknown. Nearest: .*deit_base", "list_models"),
        ("fashion_vjt", "Nearest: .*fashion_vit", ""),
        ("zzzzzzzz", "MODEL zzzzzzzz is unknown.$", "hf-hub:"),
        ("", "unknown", ""),
        ("*", "MODEL", ""),
        ("[", "MODEL", ""),
        ("deit_base.no_such_tag", "no weights with the tag 'no_such_tag'", "fb_in1k"),
        ("https://example.org/vit", "MODEL https://example.org/vit", ""),
        ("facebook/deit-base", "MODEL facebook/deit-base", ""),
        ("hf-hub:", "MODEL hf-hub:", ""),
        ("local-dir:", "MODEL local-dir:", ""),
        ("./vit_base_patch16_224", "MODEL ./vit", ""),
    ],
)
def test_a_name_that_means_none_or_many_is_refused(typed: str, message: str, hint: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        resolve(ModelRecipe(typed))
    assert hint in caught.value.hint


def test_the_built_in_model_brings_its_sizes_and_weights() -> None:
    model = load_teacher(resolve(ModelRecipe("fashion_vit")))
    assert len(model.get_submodule("blocks")._modules) == 12
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    assert resolve(ModelRecipe("fashion_vit")).checkpoint == FASHION_VIT.checkpoint


def test_an_empty_model_has_no_weights_but_the_shapes() -> None:
    model = empty_model(resolve(ModelRecipe("deit_base")))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == 86_567_656


# --- arguments of the model


@pytest.mark.parametrize(
    ("argument", "shape_of", "shape"),
    [
        ("img_size=64", "pos_embed", (1, 65, 24)),
        ("img_size=[32, 64]", "pos_embed", (1, 33, 24)),
        ("depth=2", "blocks.1.norm1.weight", (24,)),
        ("mlp_ratio=2.0", "blocks.0.mlp.fc1.weight", (48, 24)),
        ("in_chans=1", "patch_embed.proj.weight", (24, 1, 8, 8)),
        ("num-classes=7", "head.weight", (7, 24)),
        ("reg_tokens=2", "reg_token", (1, 2, 24)),
        ("qkv_bias=false", "blocks.3.attn.qkv.weight", (72, 24)),
    ],
)
def test_a_model_argument_reaches_the_constructor(argument: str, shape_of: str, shape: tuple[int, ...]) -> None:
    words = [f"{key}={value}" for key, value in ARGS.items()]
    recipe = build({"model": ARCHITECTURE, "model_arg": [*words, argument]}).model
    state = empty_model(resolve(recipe)).state_dict()
    assert tuple(state[shape_of].shape) == shape
    assert ("blocks.0.attn.qkv.bias" in state) == ("qkv_bias" not in argument)


@pytest.mark.parametrize(
    "args",
    [
        {"nonsense": 1}, {"depth": "four"}, {"num_heads": 5}, {"num_heads": 0}, {"patch_size": 0}, {"embed_dim": -24},
        {"norm_layer": "foo"}, {"global_pool": "foo"}, {"img_size": [1, 2, 3]}, {"weight_init": "foo"},
        {"pretrained": True}, {"checkpoint_path": "x"}, {"pretrained_cfg": {"file": "x"}}, {"cache_dir": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_an_argument_that_timm_cannot_take_is_named(args: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(args))):
        empty_model(resolve(ModelRecipe(ARCHITECTURE, None, {**ARGS, **args})))


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
    assert same(load_teacher(resolve(ModelRecipe(ARCHITECTURE, path, ARGS))).state_dict(), weights)


def test_a_safetensors_checkpoint_is_found_with_its_prefix(tmp_path: Path) -> None:
    weights = tiny().state_dict()
    save_file(parallel(weights), tmp_path / "w.safetensors")
    recipe = ModelRecipe(ARCHITECTURE, tmp_path / "w.safetensors", ARGS)
    assert same(load_teacher(resolve(recipe)).state_dict(), weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_teacher_is_its_checkpoint(variant: str, tmp_path: Path) -> None:
    model = tiny(variant)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    name, args = VARIANTS[variant]
    loaded = load_teacher(resolve(ModelRecipe(name, tmp_path / "w.safetensors", {**ARGS, **args})))
    assert same(loaded.state_dict(), model.state_dict())
    assert not loaded.training


def test_half_precision_weights_become_a_float32_teacher(tmp_path: Path) -> None:
    half = {name: t.half() for name, t in tiny().state_dict().items()}
    save_file(half, tmp_path / "w.safetensors")
    loaded = load_teacher(resolve(ModelRecipe(ARCHITECTURE, tmp_path / "w.safetensors", ARGS))).state_dict()
    assert same(loaded, {name: t.float() for name, t in half.items()})


def test_weights_of_another_publisher_are_translated(tmp_path: Path) -> None:
    """timm's own translation: DINOv2's checkpoints name LayerScale and registers otherwise, and hold a mask token."""
    model = tiny("registers")
    theirs = {name.replace("reg_token", "register_tokens"): t for name, t in model.state_dict().items()}
    theirs["mask_token"] = torch.zeros(1, 24)
    whole = {**theirs, "pos_embed": torch.cat([torch.zeros(1, 1, 24), theirs["pos_embed"]], dim=1)}
    torch.save(whole, tmp_path / "w.pth")
    name, args = VARIANTS["registers"]
    loaded = load_teacher(resolve(ModelRecipe(name, tmp_path / "w.pth", {**ARGS, **args}))).state_dict()
    assert torch.equal(loaded["reg_token"], model.state_dict()["reg_token"])


# --- folders and the Hub


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_local_folder_brings_model_weights_and_data_config(file: str, tmp_path: Path) -> None:
    weights = tiny().state_dict()
    folder = save_as_timm_does(tmp_path / "my model #1?", weights, file=file)
    recipe = ModelRecipe(f"local-dir:{folder}")
    found = resolve(recipe)
    assert (found.name, found.architecture, found.model_args) == (recipe.model, ARCHITECTURE, ARGS)
    model = load_teacher(found)
    assert same(model.state_dict(), weights)
    config = data_config(model, recipe)
    assert (config["mean"], config["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 0.8)


def test_a_planned_model_has_the_same_data_config_as_a_loaded_one(tmp_path: Path) -> None:
    recipe = ModelRecipe(f"local-dir:{save_as_timm_does(tmp_path / 'm', tiny().state_dict())}")
    found = resolve(recipe)
    assert data_config(empty_model(found), recipe) == data_config(load_teacher(found), recipe)


def test_a_model_argument_wins_over_the_folders_own(tmp_path: Path) -> None:
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict())
    found = resolve(ModelRecipe(f"local-dir:{folder}", None, {"drop_path_rate": 0.25}))
    assert found.model_args == {**ARGS, "drop_path_rate": 0.25}


def test_a_checkpoint_wins_over_the_folders_own(tmp_path: Path) -> None:
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict())
    other = {name: t + 1 for name, t in tiny().state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    loaded = load_teacher(resolve(ModelRecipe(f"local-dir:{folder}", tmp_path / "other.safetensors")))
    assert same(loaded.state_dict(), other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"{}", "no 'architecture'"),
        (
            b'{"architecture": "no_such_vit", "num_classes": 5, "pretrained_cfg": {}}',
            "'no_such_vit' is not one of timm's",
        ),
        (b'{"architecture": 7, "pretrained_cfg": {}}', "MODEL"),
        (b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": [1]}', "MODEL"),
        (b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": 3}', "MODEL"),
        (
            b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": {"depth": 300000}}',
            "its depth cannot be 300000",
        ),
        (
            b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": {"norm_eps": "x"}}',
            "its norm_eps cannot be x",
        ),
        (
            b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 32, 32], "mean": "x"}}',
            "its mean",
        ),
        (b"[" * 100_000, "cannot be read"),
    ],
    ids=[
        "missing",
        "empty",
        "cut",
        "list",
        "binary",
        "no-keys",
        "unknown",
        "number",
        "args-list",
        "cfg-number",
        "depth",
        "eps",
        "mean",
        "deep",
    ],
)
def test_a_folder_whose_config_is_no_config_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        resolve(ModelRecipe(f"local-dir:{tmp_path}"))
    assert str(tmp_path) in str(caught.value)


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
        load_teacher(resolve(ModelRecipe(f"local-dir:{folder}")))


def test_a_file_too_small_for_its_model_is_refused_before_there_is_memory_for_it(tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    wide = {"embed_dim": 65_536, "depth": 12, "num_heads": 1}
    source = Source("vit_tiny_patch16_224", "vit_tiny_patch16_224", wide, {}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit the model: it has [\d,]+ bytes"):
        load_teacher(source)


def test_a_teacher_is_never_left_with_a_random_head(tmp_path: Path) -> None:
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict())
    with pytest.raises(VitcompressError, match="head"):
        load_teacher(resolve(ModelRecipe(f"local-dir:{folder}", None, {"num_classes": 7})))


def test_a_hub_model_comes_through_the_hub_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tiny().state_dict()
    folder = save_as_timm_does(tmp_path / "hub", weights)
    asked: list[tuple[str, str, str | None]] = []

    def download(repo_id: str, filename: str, revision: str | None = None, **rest: Any) -> str:
        asked.append((repo_id, filename, revision))
        return str(folder / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    recipe = ModelRecipe("hf-hub:someone/tiny@v2")
    model = load_teacher(resolve(recipe))
    assert same(model.state_dict(), weights)
    assert data_config(model, recipe)["mean"] == (0.1, 0.2, 0.3)
    assert {(repo, revision) for repo, _, revision in asked} == {("someone/tiny", "v2")}


@pytest.mark.parametrize("model", ["hf-hub:someone/tiny", "deit_tiny"])
def test_without_a_network_the_hint_is_a_checkpoint(model: str, no_network: None) -> None:
    with pytest.raises(VitcompressError, match=model) as caught:
        load_teacher(resolve(ModelRecipe(model)))
    assert "--checkpoint" in caught.value.hint
