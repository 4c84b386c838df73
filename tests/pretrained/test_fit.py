"""Every tensor of a checkpoint is taken, told of, left out for a reason, or refused by name."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.factories import ROWS, Row, build, row_images
from tests.pretrained.published import PUBLISHED
from vitcompress.errors import CheckpointError
from vitcompress.pretrained.fit import Fitted, fit

WHAT = "--checkpoint w.pth"


def emptied(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are all NaN, so that one that is not filled shows."""
    empty = copy.deepcopy(model)
    with torch.no_grad():
        for p in empty.parameters():
            p.fill_(torch.nan)
    return empty


def fitted(model: nn.Module, weights: dict[str, Tensor]) -> tuple[nn.Module, Fitted]:
    result = fit(emptied(model), weights, WHAT)
    filled = emptied(model)
    filled.load_state_dict(result.tensors)
    return filled, result


def sized(name: str, **args: object) -> nn.Module:
    row = ROWS[name]
    return build(Row(row.family, row.architecture, {**row.args, **args}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_as_their_publisher_names_them_give_the_same_logits(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = build(ROWS[name]), row_images(ROWS[name])
    filled, _ = fitted(model, PUBLISHED[name](model))
    torch.testing.assert_close(filled(images), model(images), rtol=1e-5, atol=1e-5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("vit", {"patch_size": 4, "img_size": 16}, {}, ["patch embedding resampled from 4x4 to 8x8."]),
        ("vit", {"img_size": 48}, {}, ["position embedding resampled from 6x6 to 4x4."]),
        ("vit", {}, {"img_size": (32, 64)}, ["position embedding resampled from 4x4 to 4x8."]),
        ("deit distilled", {"img_size": 48}, {}, ["position embedding resampled from 6x6 to 4x4."]),
        ("dinov2 registers", {"img_size": 48}, {}, ["position embedding resampled from 6x6 to 4x4."]),
        ("swin", {}, {"window_size": 2}, ["relative position bias resampled from window 4x4 to 2x2 (8 tensors)."]),
        ("swin", {"patch_size": 4}, {}, ["patch embedding resampled from 4x4 to 2x2.",
                                         "relative position bias resampled from window 2x2 to 4x4 (2 tensors)."]),
        ("swin v2", {"patch_size": 4, "img_size": 64}, {}, ["patch embedding resampled from 4x4 to 2x2."]),
        ("beit", {"img_size": 48}, {}, ["relative position bias resampled from window 6x6 to 4x4 (4 tensors)."]),
        ("beit shared bias", {"img_size": 48}, {}, ["relative position bias resampled from window 6x6 to 4x4."]),
        ("eva02", {"img_size": 48}, {}, ["position embedding resampled from 6x6 to 4x4."]),
    ],
)  # fmt: skip
def test_what_is_resampled_is_told_with_its_sizes(
    name: str,
    old: dict[str, object],
    new: dict[str, object],
    told: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    filled, result = fitted(sized(name, **new), dict(sized(name, **old).state_dict()))
    assert list(result.notes) == told
    assert all(bool(p.isfinite().all()) for p in filled.parameters())
    assert capfd.readouterr() == ("", "")


def test_a_table_of_another_window_is_told_and_one_of_other_values_is_refused() -> None:
    """Swin V2 has no parameter of the window's size: only its tables tell windows apart."""
    model, small = sized("swin v2"), sized("swin v2", window_size=2)
    _, result = fitted(small, PUBLISHED["swin v2"](model))
    assert "relative_coords_table" in result.notes[0]
    assert "the model computes it, for windows of 2x2 instead of 4x4" in result.notes[0]
    pretrained = sized("swin v2", pretrained_window_sizes=(2, 2, 2))
    with pytest.raises(CheckpointError, match=r"table: layers\.0\.blocks\.0\.attn\.relative_coords_table .* differs"):
        fitted(model, PUBLISHED["swin v2"](pretrained))


def test_biases_that_timm_drops_and_prints_about_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    weights = PUBLISHED["dinov3 biases"](build(ROWS["dinov3 biases"]))
    with pytest.raises(CheckpointError, match=r"dropped: blocks\.0\.attn\.qkv\.bias \(96,\) … \(2 more\)") as caught:
        fitted(build(ROWS["dinov3"]), weights)
    assert "qkvb" in caught.value.hint
    assert capsys.readouterr() == ("", "")
    zero = {name: 0 * t if name.endswith("qkv.bias") else t for name, t in weights.items()}
    fitted(build(ROWS["dinov3"]), zero)


def test_biases_of_keys_that_nothing_masks_are_refused() -> None:
    model = build(ROWS["dinov3 biases"])
    weights = {n: t for n, t in PUBLISHED["dinov3 biases"](model).items() if not n.endswith("bias_mask")}
    with pytest.raises(CheckpointError, match=r"dropped: blocks\.0\.attn\.qkv\.bias"):
        fitted(model, weights)


@pytest.mark.parametrize(
    ("name", "extra", "named"),
    [
        ("vit", "pre_logits.fc.weight", r"pre_logits\.fc\.weight"),
        ("vit", "fc_norm.weight", r"fc_norm\.weight"),
        ("vit", "blocks.0.attn.q_norm.weight", r"q_norm"),
        ("eva02", "norm.weight", r"norm\.weight"),
        ("eva02", "rope.weight", r"rope\.weight"),
        ("swin", "pre_head.weight", r"pre_head\.weight"),
        ("beit", "norm.weight", r"norm\.weight"),
    ],
)
def test_a_layer_that_the_model_has_no_place_for_is_refused_by_name(name: str, extra: str, named: str) -> None:
    model = build(ROWS[name])
    weights = {**model.state_dict(), extra: torch.randn(32, 32)}
    with pytest.raises(CheckpointError, match=rf"(unexpected|dropped): .*{named}") as caught:
        fitted(model, weights)
    assert "qkvb" not in caught.value.hint
    longer = {f"{key}x" if key == "head.bias" else key: t for key, t in weights.items()}
    with pytest.raises(CheckpointError, match="does not fit"):
        fitted(model, {**longer, "mask_token": torch.zeros(1, 1, 32)})


LEFT_OUT = {
    "mask_token": "pretraining only",
    "head.mlp.0.weight": "the projection head of DINO",
    "decoder_blocks.0.norm1.weight": "masked autoencoder",
    "train_acc.confmat": "losses and metrics",
    "criterion.weight": "losses and metrics",
    "n_averaged": "",
    "blocks.0.total_ops": "",
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_not_part_of_the_model_is_left_out_and_told(name: str) -> None:
    model = sized("vit", num_classes=0)
    filled, result = fitted(model, {**model.state_dict(), name: torch.ones(2)})
    images = row_images(ROWS["vit"])
    assert torch.equal(filled(images), model(images))
    assert [LEFT_OUT[name] in note for note in result.notes] == ([True] if LEFT_OUT[name] else [])


@pytest.mark.parametrize("name", ["head.mlp.0.weight", "projector.weight", "predictor.0.bias", "pooler.dense.weight"])
def test_what_may_stand_before_a_classifier_is_not_left_out_of_a_model_with_one(name: str) -> None:
    model = build(ROWS["vit"])
    with pytest.raises(CheckpointError, match=rf"(unexpected|dropped): {re.escape(name)}"):
        fitted(model, {**model.state_dict(), name: torch.ones(2)})


def test_a_mask_of_biases_counts_where_names_and_shapes_fit_already() -> None:
    model = build(ROWS["vit"])
    weights = dict(model.state_dict())
    mask = torch.ones(96).index_fill(0, torch.arange(32, 64), 0)
    filled, result = fitted(model, {**weights, "blocks.0.attn.qkv.bias_mask": mask})
    assert result.notes == ("the masks of biases (bias_mask) were multiplied in.",)
    with pytest.raises(CheckpointError, match=r"head\.bias_mask"):
        fitted(model, {**weights, "head.bias_mask": torch.zeros(5)})
    assert torch.equal(filled.state_dict()["blocks.0.attn.qkv.bias"], weights["blocks.0.attn.qkv.bias"] * mask)


def test_the_classifier_is_left_out_of_a_model_built_without_one() -> None:
    headed, headless = build(ROWS["vit"]), sized("vit", num_classes=0)
    _, result = fitted(headless, dict(headed.state_dict()))
    assert result.notes == ("left out head.weight and 1 more: the model is built without a classifier.",)
    with pytest.raises(CheckpointError, match=r"missing: head\.weight") as caught:
        fitted(headed, dict(headless.state_dict()))
    assert "num_classes=0" in caught.value.hint


def test_whole_numbers_are_not_taken_for_weights() -> None:
    model = build(ROWS["vit"])
    weights = {**model.state_dict(), "head.weight": torch.ones(5, 32, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"type: head\.weight holds int8"):
        fitted(model, weights)


def test_two_tensors_that_get_one_name_are_not_merged_silently() -> None:
    """timm renames `norm` to `fc_norm` where there is a mask token, over an `fc_norm`."""
    model = build(ROWS["eva02"])
    weights = {**model.state_dict(), "mask_token": torch.zeros(1, 1, 32)}
    both = {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32), **weights}
    for order in (both, dict(reversed(both.items()))):
        with pytest.raises(CheckpointError, match=r"(fc_)?norm\.weight"):
            fitted(model, order)


def test_a_model_of_no_family_takes_its_own_weights_only() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    _, result = fitted(model, dict(model.state_dict()))
    assert result.notes == ()
    with pytest.raises(CheckpointError, match=re.escape("missing: fc.weight")):
        fitted(model, {n: t for n, t in model.state_dict().items() if not n.startswith("fc.")})
