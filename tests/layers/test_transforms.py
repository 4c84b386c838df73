from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.factories import compressed, images, tiny
from vitcompress.families.vit import MixedAttention
from vitcompress.layers.mixed_attention import mix_heads
from vitcompress.layers.transforms import (
    HeadMix,
    KeyPositions,
    TokenConvolution,
    attach_token_convolution,
    offset_buckets,
)


def test_head_mix_starts_as_the_identity() -> None:
    maps = torch.randn(2, 3, 5, 5)
    assert torch.equal(mix_heads(maps, HeadMix(3).weight), maps)


def test_head_mix_is_a_1x1_convolution_over_heads() -> None:
    mix = HeadMix(3).double()
    nn.init.normal_(mix.weight)
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(mix_heads(maps, mix.weight), F.conv2d(maps, mix.weight[:, :, None, None]))


def test_token_convolution_starts_as_the_identity() -> None:
    x = torch.randn(2, 1 + 12, 6)
    assert torch.equal(TokenConvolution(6, 3, grid_size=(3, 4), num_prefix_tokens=1)(x), x)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_token_convolution_moves_patches_by_hand(prefix: int) -> None:
    """A kernel with one weight, right of its centre, adds each patch's right neighbour."""
    convolution = TokenConvolution(2, 3, grid_size=(2, 3), num_prefix_tokens=prefix)
    nn.init.zeros_(convolution.weight)
    with torch.no_grad():
        convolution.weight[:, 0, 1, 2] = 1.0
    x = torch.randn(1, prefix + 6, 2)
    out = convolution(x)
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    grid, moved = x[0, prefix:].reshape(2, 3, 2), out[0, prefix:].reshape(2, 3, 2)
    torch.testing.assert_close(moved[:, :2], grid[:, :2] + grid[:, 1:])
    assert torch.equal(moved[:, 2], grid[:, 2])


def test_token_convolution_follows_a_square_of_another_size() -> None:
    convolution = TokenConvolution(2, 3, grid_size=(2, 2), num_prefix_tokens=1)
    assert convolution(torch.randn(1, 1 + 25, 2)).shape == (1, 26, 2)
    with pytest.raises(ValueError, match="26 patches are neither 2×2 nor a square"):
        convolution(torch.randn(1, 1 + 26, 2))


def test_both_transformations_learn_from_the_first_step() -> None:
    model = tiny()
    block = model.blocks[0]  # type: ignore[index]
    block.attn = MixedAttention(block.attn)  # type: ignore[union-attr]
    convolution = TokenConvolution(24, 3, grid_size=(4, 4), num_prefix_tokens=1)
    attach_token_convolution(block.mlp, convolution)  # type: ignore[union-attr]
    model(images(model)).square().sum().backward()
    for weight in (block.attn.mix_logits.weight, block.attn.mix_probs.weight, convolution.weight):  # type: ignore[union-attr]
        assert weight.grad.abs().max() > 0  # type: ignore[union-attr]


def test_mixed_attention_equals_attention_over_mixed_maps() -> None:
    """Against a plain loop over heads, in float64, with mixes other than the identity."""
    attn = tiny().blocks[0].attn.double()  # type: ignore[index, union-attr]
    mixed: Any = MixedAttention(attn)
    for mix in (mixed.mix_logits, mixed.mix_probs):
        nn.init.normal_(mix.weight)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    q, k, v = attn.qkv(x).reshape(2, 7, 3, 3, 8).unbind(2)
    logits = [q[:, :, h] @ k[:, :, h].transpose(1, 2) / 8**0.5 for h in range(3)]
    probs = [sum(mixed.mix_logits.weight[g, h] * logits[h] for h in range(3)).softmax(-1) for g in range(3)]
    heads = [sum(mixed.mix_probs.weight[g, h] * probs[h] for h in range(3)) @ v[:, :, g] for g in range(3)]
    torch.testing.assert_close(mixed(x), attn.proj(torch.cat(heads, dim=-1)))


def test_mixed_attention_keeps_masked_places_masked() -> None:
    mixed: Any = MixedAttention(tiny().blocks[0].attn)  # type: ignore[index, union-attr]
    nn.init.normal_(mixed.mix_logits.weight)
    x = torch.randn(1, 6, 24)
    changed = x.clone()
    changed[:, 3:] += 1.0
    assert torch.equal(mixed(x, is_causal=True)[:, :3], mixed(changed, is_causal=True)[:, :3])


def test_offsets_fall_in_seven_buckets() -> None:
    """By Eq. 18 of iRPE: 1.9 + ln(d/1.9)/ln 8 · 1.9 = 1.9, 2.3, 2.6, 3.4 for d = 2, 3, 4, 10."""
    expected = [0, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    buckets = offset_buckets(14, torch.device("cpu"))
    assert buckets[:, 0].tolist() == [3 + b for b in expected]  # the key precedes the query
    assert buckets[0].tolist() == [3 - b for b in expected]
    assert torch.equal(buckets[5:, 5:], buckets[:9, :9])
    assert offset_buckets(24, torch.device("cpu")).unique().tolist() == list(range(7))


def test_key_positions_start_at_zero_and_have_49_buckets() -> None:
    term = KeyPositions(64, grid_size=(3, 4), num_prefix_tokens=1)
    assert torch.equal(term(torch.randn(2, 3, 13, 64)), torch.zeros(2, 3, 13, 13))
    assert 12 * KeyPositions.num_params(64) == 12 * term.weight.numel() == 37_632


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_key_positions_equal_a_loop_over_pairs_of_patches(prefix: int) -> None:
    term = KeyPositions(8, grid_size=(3, 6), num_prefix_tokens=prefix).double()
    nn.init.normal_(term.weight)
    q = torch.randn(2, 3, prefix + 18, 8, dtype=torch.float64)
    step = {-5: -3, -4: -3, -3: -2, -2: -2, -1: -1, 0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 5: 3}
    expected = torch.zeros(2, 3, prefix + 18, prefix + 18, dtype=torch.float64)
    for i in range(18):
        for j in range(18):
            bucket = 7 * (step[i // 6 - j // 6] + 3) + step[i % 6 - j % 6] + 3
            expected[:, :, prefix + i, prefix + j] = q[:, :, prefix + i] @ term.weight[:, bucket]
    torch.testing.assert_close(term(q), expected)


def test_key_positions_follow_a_square_of_another_size() -> None:
    term = KeyPositions(8, grid_size=(2, 2), num_prefix_tokens=1)
    assert term(torch.randn(1, 3, 1 + 25, 8)).shape == (1, 3, 26, 26)
    with pytest.raises(ValueError, match="26 patches are neither 2×2 nor a square"):
        term(torch.randn(1, 3, 1 + 26, 8))


def test_the_position_term_joins_the_logits_before_they_are_mixed() -> None:
    """Order of the released Mini-DeiT: q·scale, QKᵀ + term, pre-mix, softmax, post-mix."""
    model = tiny().double()
    student, _ = compressed(model, share=1, transforms=("rpe", "heads"))
    mixed: Any = student.get_submodule("blocks.0.attn")
    for weight in (mixed.rpe.weight, mixed.mix_logits.weight, mixed.mix_probs.weight):
        nn.init.normal_(weight)
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    q, k, v = mixed.qkv(x).reshape(2, 17, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    q = q / 8**0.5
    logits = torch.einsum("gh,bhnm->bgnm", mixed.mix_logits.weight, q @ k.transpose(-2, -1) + mixed.rpe(q))
    probs = torch.einsum("gh,bhnm->bgnm", mixed.mix_probs.weight, logits.softmax(-1))
    expected = mixed.proj((probs @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed(x), expected)


def test_a_position_term_without_head_mixing_mixes_nothing() -> None:
    student, plan = compressed(tiny(), share=2, transforms=("rpe",))
    assert not any(isinstance(module, HeadMix) for module in student.modules())
    assert plan.size.student_params == sum(p.numel() for p in student.parameters())
    student(images(student)).square().sum().backward()
    terms: list[Any] = [module for module in student.modules() if isinstance(module, KeyPositions)]
    assert all(term.weight.grad.abs().max() > 0 for term in terms[:-1])
    assert terms[-1].weight.grad.abs().max() == 0  # only the class token is used after it, and it has no term
