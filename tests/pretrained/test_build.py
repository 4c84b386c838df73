"""Models built without weights, and the arguments their constructors take."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import ARCHITECTURE
from tests.factories import ARGS
from vitcompress.errors import ModelError
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.resolve import resolve
from vitcompress.recipe import ModelRecipe
from vitcompress.recipe.compose import build


def test_an_empty_model_has_no_weights_but_the_shapes() -> None:
    model = empty_model(resolve(ModelRecipe("deit_base")))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == 86_567_656


@pytest.mark.parametrize(
    ("argument", "shape_of", "shape"),
    [
        ("img_size=64", "pos_embed", (1, 65, 24)),
        ("img_size=[32, 64]", "pos_embed", (1, 33, 24)),
        ("img_size=32,64", "pos_embed", (1, 33, 24)),
        ("img_size=(32, 64)", "pos_embed", (1, 33, 24)),
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


@pytest.mark.parametrize("text", ["2,2,2", "2, 2, 2", "(2,2,2)", "[2,2,2]"])
def test_a_list_of_numbers_is_one_number_per_stage(text: str) -> None:
    words = ["img_size=32", "patch_size=2", "embed_dim=16", "num_heads=2,4,8", "window_size=4", f"depths={text}"]
    recipe = build({"model": "swin_tiny", "model_arg": words}).model
    assert recipe.model_arg["depths"] == [2, 2, 2]
    state = empty_model(resolve(recipe)).state_dict()
    assert "layers.2.blocks.1.norm1.weight" in state
    assert "layers.0.blocks.2.norm1.weight" not in state


@pytest.mark.parametrize(
    ("text", "value"), [("a,b", "a,b"), ("gelu", "gelu"), ("2,b", "2,b"), ("0.5,1", [0.5, 1]), ("',,'", ",,")]
)
def test_what_is_no_list_of_numbers_stays_as_it_is(text: str, value: object) -> None:
    assert build({"model": "vit_tiny", "model_arg": [f"key={text}"]}).model.model_arg == {"key": value}


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
