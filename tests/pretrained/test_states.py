"""Which of the state dicts in a checkpoint is taken, and what comes off its names."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from tests.conftest import ARCHITECTURE
from tests.factories import ARGS, tiny
from vitcompress.errors import CheckpointError
from vitcompress.pretrained.load import load_pretrained
from vitcompress.pretrained.resolve import resolve
from vitcompress.recipe import ModelRecipe

State = dict[str, Tensor]


def other(state: State) -> State:
    return {name: t + 1 for name, t in state.items()}


def fresh(state: State) -> State:
    """A state as training starts: biases of zero, norms of one."""
    return {n: torch.zeros_like(t) if n.endswith("bias") else torch.ones_like(t) for n, t in state.items()}


def near(state: State) -> State:
    return {name: 0.9 * t for name, t in state.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: t for name, t in state.items()}


def load(path: Path, key: str | None = None, **args: int) -> tuple[State, list[str]]:
    told: list[str] = []
    recipe = ModelRecipe(ARCHITECTURE, path, {**ARGS, **args}, checkpoint_key=key)
    model = load_pretrained(resolve(recipe), told.append)
    return dict(model.state_dict()), [note.removeprefix(f"--checkpoint {path}: ") for note in told]


def same(one: State, expected: State) -> bool:
    return one.keys() == expected.keys() and all(torch.equal(one[name], expected[name]) for name in one)


WRAPPINGS: dict[str, tuple[Callable[[State], Any], list[str]]] = {
    "lightning": (lambda w: {"state_dict": under("model.", w), "hyper_parameters": {"lr": 1}},
                  ["the weights under state_dict were taken.", "the prefix model. was taken off the names."]),
    "deepspeed": (lambda w: {"module": w, "ds_version": "0.12"}, ["the weights under module were taken."]),
    "net": (lambda w: {"net": w, "acc": 1.0, "epoch": np.float64(3)}, ["the weights under net were taken."]),
    "optimizer": (lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {0: {"exp_avg": w["head.bias"]}}},
                             "ema_optimizer": other(w), "args": argparse.Namespace(lr=1)},
                  ["the weights under model_state_dict were taken."]),
    "nested": (lambda w: {"model": {"module": under("module.", w)}},
               ["the weights under model.module were taken.", "the prefix module. was taken off the names."]),
    "moco": (lambda w: under("module.base_encoder.", w), ["the prefix module.base_encoder. was taken off the names."]),
    "encoder": (lambda w: under("encoder.", w), ["the prefix encoder. was taken off the names."]),
    "compiled": (lambda w: under("_orig_mod.module.", w), ["the prefix _orig_mod.module. was taken off the names."]),
    "averaged": (lambda w: {"n_averaged": torch.tensor(1), **under("module.", w)},
                 ["the prefix module. was taken off the names."]),
    "counted": (lambda w: {"total_ops": torch.zeros(1), "blocks.0.total_params": torch.zeros(1), **w}, []),
    "wrapped blocks": (lambda w: {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in w.items()},
                       ["_orig_mod was taken out of the names."]),
    "counts": (lambda w: {**w, "epoch": torch.tensor(3)},
               ["left out epoch: counts of training are not part of the model."]),
    "head beside": (lambda w: {n if n.startswith("head") else f"backbone.{n}": t for n, t in w.items()},
                    ["the prefix backbone. was taken off the names."]),
    "equal twice": (lambda w: {"teacher": under("backbone.", w), "student": under("module.backbone.", w)},
                    ["teacher, student are equal; teacher was taken.",
                     "the prefix backbone. was taken off the names."]),
    "equal prefixes": (lambda w: {**under("student.", w), **under("teacher.", w)},
                       ["the prefix student. was taken off the names."]),
    "followed": (lambda w: {"model": near(w), "model_ema": w},
                 ["model_ema was taken, the moving average of model, as timm does. --checkpoint-key model takes the "
                  "other."]),
    "ema of another kind": (lambda w: {"state_dict": near(w), "ema_state_dict": under("module.", w)},
                            ["ema_state_dict was taken, the moving average of state_dict, as timm does. "
                             "--checkpoint-key state_dict takes the other.",
                             "the prefix module. was taken off the names."]),
    "another teacher": (lambda w: {"teacher": {f"conv{i}.weight": torch.ones(2) for i in range(90)}, "student": w},
                        ["the weights under student were taken."]),
}  # fmt: skip


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapping_is_taken_off_and_told(wrapping: str, tmp_path: Path) -> None:
    weights = dict(tiny().state_dict())
    wrap, notes = WRAPPINGS[wrapping]
    torch.save(wrap(weights), tmp_path / "w.pth")
    loaded, told = load(tmp_path / "w.pth")
    assert same(loaded, weights)
    assert told == notes


def test_the_teacher_of_dino_is_its_backbone(tmp_path: Path) -> None:
    weights = dict(tiny(num_classes=0).state_dict())
    teacher = {
        **under("backbone.", weights),
        "head.mlp.0.weight": torch.ones(2),
        "head.last_layer.weight_v": torch.ones(2),
    }
    student = {**under("module.backbone.", near(weights)), "module.head.mlp.0.weight": torch.ones(2)}
    torch.save({"student": student, "teacher": teacher, "dino_loss": {"center": torch.ones(1)}}, tmp_path / "dino.pth")
    loaded, told = load(tmp_path / "dino.pth", "teacher", num_classes=0)
    assert same(loaded, weights)
    assert told[-1] == (
        "left out head.mlp.0.weight and 1 more: the projection head of DINO and iBOT is for pretraining only."
    )


def test_the_average_that_torch_keeps_is_read(tmp_path: Path) -> None:
    model = tiny()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "swa.pth")
    assert same(load(tmp_path / "swa.pth")[0], dict(model.state_dict()))


UNCLEAR: dict[str, tuple[Callable[[State], Any], str, str]] = {
    "untrained average": (lambda w: {"model": w, "model_ema": fresh(w)},
                          "moving average model_ema, which has hardly followed them",
                          "--checkpoint-key model or --checkpoint-key model_ema"),
    "untrained head of an average": (
        lambda w: {"state_dict": w, "state_dict_ema": {n: 0 * t if n == "head.bias" else t for n, t in w.items()}},
        "hardly followed", "--checkpoint-key state_dict or --checkpoint-key state_dict_ema"),
    "head of an average at random": (
        lambda w: {"model": w, "model_ema": {n: t.flip(0) if n == "head.weight" else t for n, t in w.items()}},
        "hardly followed", "--checkpoint-key model"),
    "teacher and student": (lambda w: {"student": w, "teacher": near(w)},
                            "several states that differ: student, teacher",
                            "--checkpoint-key student or --checkpoint-key teacher"),
    "three": (lambda w: {"model": w, "model_ema": near(w), "best": other(w)}, "several states that differ", "best"),
    "two prefixes": (lambda w: {**under("base_encoder.", w), **under("momentum_encoder.", near(w))},
                     "several models that differ",
                     "--checkpoint-key base_encoder or --checkpoint-key momentum_encoder"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNCLEAR)
def test_an_unclear_choice_is_left_to_the_user(case: str, tmp_path: Path) -> None:
    wrap, message, hint = UNCLEAR[case]
    torch.save(wrap(dict(tiny().state_dict())), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / "w.pth")
    assert hint in caught.value.hint
    keys = re.findall(r"--checkpoint-key (\S+?)(?= or|\.$)", caught.value.hint)
    for key in keys:  # what the hint says works
        assert load(tmp_path / "w.pth", key)[1][0] == f"the weights under {key} were taken."


@pytest.mark.parametrize("key", ["model.ema.module", "model.ema", "module.model", "prefixed.student"])
def test_a_key_names_one_state(key: str, tmp_path: Path) -> None:
    weights = dict(tiny().state_dict())
    tree = {
        "model": {"ema": {"module": weights}, "now": other(weights)},
        "module.model": weights,
        "prefixed": {**under("student.", weights), **under("teacher.", other(weights))},
    }
    torch.save(tree, tmp_path / "w.pth")
    assert same(load(tmp_path / "w.pth", key)[0], weights)


@pytest.mark.parametrize(
    ("tree", "listed"),
    [
        (lambda w: {"model": w, "model_ema": w, "optimizer": {"momentum": {"a": w["head.bias"]}}},
         "model (56 tensors), model_ema (56 tensors), optimizer.momentum (1 tensor)"),
        (lambda w: under("backbone.", w), "no keys; its names start with backbone"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_answered_with_the_keys_of_the_file(
    tree: Callable[[State], Any], listed: str, tmp_path: Path
) -> None:
    torch.save(tree(dict(tiny().state_dict())), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="there are no weights under 'modle'") as caught:
        load(tmp_path / "w.pth", "modle")
    assert listed in caught.value.hint


# --- shards


def write_shards(folder: Path, weights: State, *, suffix: str = ".safetensors", stem: str = "model") -> Path:
    folder.mkdir()
    names = list(weights)
    shard_of = {name: f"{stem}-0000{1 + (i > 9)}-of-00002{suffix}" for i, name in enumerate(names)}
    for shard in set(shard_of.values()):
        part = {name: weights[name].contiguous() for name in names if shard_of[name] == shard}
        save_file(part, folder / shard) if suffix == ".safetensors" else torch.save(part, folder / shard)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return index


@pytest.mark.parametrize(("suffix", "stem"), [(".safetensors", "model"), (".bin", "pytorch_model")])
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "index"])
def test_shards_are_read_together(suffix: str, stem: str, whole: bool, tmp_path: Path) -> None:
    weights = dict(tiny().state_dict())
    index = write_shards(tmp_path / "m", weights, suffix=suffix, stem=stem)
    assert same(load(index.parent if whole else index)[0], weights)


def test_a_shard_that_does_not_hold_what_its_index_lists_is_named(tmp_path: Path) -> None:
    weights = dict(tiny().state_dict())
    index = write_shards(tmp_path / "m", weights)
    shard = index.parent / "model-00001-of-00002.safetensors"
    save_file({"cls_token": weights["cls_token"]}, shard)
    with pytest.raises(CheckpointError, match=f"its shard {shard.name} holds other tensors than the index lists"):
        load(index)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"its shard {shard.name} does not exist"):
        load(index)


@pytest.mark.parametrize("place", ["../w.safetensors", "/etc/passwd", "model.safetensors.index.json"])
def test_shards_outside_the_folder_are_not_read(place: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"head.bias": place}}))
    with pytest.raises(CheckpointError, match="lists shards outside its folder"):
        load(index)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(index)


@pytest.mark.parametrize(("files", "message"), [(("a.pth", "b.pth"), "several: a.pth, b.pth"), ((), "none")])
def test_a_folder_without_one_file_of_weights_is_refused(files: tuple[str, ...], message: str, tmp_path: Path) -> None:
    for name in files:
        torch.save(dict(tiny().state_dict()), tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
