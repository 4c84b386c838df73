"""Google's .npz files give what timm makes of them, and every array is accounted for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray

from tests.conftest import ARCHITECTURE
from tests.factories import ARGS, tiny
from vitcompress.errors import CheckpointError
from vitcompress.pretrained.load import load_pretrained
from vitcompress.pretrained.resolve import resolve
from vitcompress.recipe import ModelRecipe

Arrays = dict[str, NDArray[np.float32]]


def published(*, prefix: str = "") -> Arrays:
    """The weights of `tiny()` as ViT was published."""
    width, heads = ARGS["embed_dim"], ARGS["num_heads"]
    weights = {name: t.numpy() for name, t in tiny().state_dict().items()}
    arrays = {
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "cls": weights["cls_token"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    for i in range(ARGS["depth"]):
        block, new = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for old, norm in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{new}{norm}/scale"] = weights[f"{block}{old}.weight"]
            arrays[f"{new}{norm}/bias"] = weights[f"{block}{old}.bias"]
        for old, dense in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{new}MlpBlock_3/{dense}/kernel"] = weights[f"{block}mlp.{old}.weight"].T
            arrays[f"{new}MlpBlock_3/{dense}/bias"] = weights[f"{block}mlp.{old}.bias"]
        attention = f"{new}MultiHeadDotProductAttention_1/"
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * width, (j + 1) * width)
            arrays[f"{attention}{part}/kernel"] = weights[f"{block}attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            arrays[f"{attention}{part}/bias"] = weights[f"{block}attn.qkv.bias"][rows].reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = weights[f"{block}attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}out/bias"] = weights[f"{block}attn.proj.bias"]
    return {f"{prefix}{name}": np.ascontiguousarray(array) for name, array in arrays.items()}


def save(path: Path, arrays: Arrays) -> ModelRecipe:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return ModelRecipe(ARCHITECTURE, path, ARGS)


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_an_npz_file_gives_what_timm_makes_of_it(prefix: str, tmp_path: Path) -> None:
    recipe = save(tmp_path / "vit.npz", published(prefix=prefix))
    loaded = load_pretrained(resolve(recipe)).state_dict()
    expected = timm.create_model(ARCHITECTURE, **ARGS)
    expected.load_pretrained(tmp_path / "vit.npz")
    assert loaded.keys() == expected.state_dict().keys()
    for name, t in expected.state_dict().items():
        assert torch.equal(loaded[name], t), name


def test_arrays_that_the_model_has_no_place_for_are_refused_by_name(tmp_path: Path) -> None:
    """timm skips the layer before the head, and a head of another number of classes."""
    kernel = np.ones((24, 24), np.float32)
    with pytest.raises(CheckpointError, match=r"dropped: pre_logits\.weight"):
        load_pretrained(resolve(save(tmp_path / "vit.npz", {**published(), "pre_logits/kernel": kernel})))
    with pytest.raises(CheckpointError, match=r"shape: head\.weight is \(24, 24\)"):
        load_pretrained(resolve(save(tmp_path / "vit.npz", {**published(), "head/kernel": kernel})))


def test_an_npz_file_of_another_image_size_is_resampled_and_told(tmp_path: Path) -> None:
    arrays = {**published(), "Transformer/posembed_input/pos_embedding": np.ones((1, 37, 24), np.float32)}
    told: list[str] = []
    load_pretrained(resolve(save(tmp_path / "vit.npz", arrays)), told.append)
    assert told == [f"--checkpoint {tmp_path / 'vit.npz'}: position embedding resampled from 6x6 to 4x4."]
