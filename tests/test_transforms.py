import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitcompress.families.vit import MixedAttention
from vitcompress.transforms import HeadMix, TokenConvolution, attach_token_convolution

from .tiny import images, tiny


def test_head_mix_starts_as_the_identity() -> None:
    maps = torch.randn(2, 3, 5, 5)
    assert torch.equal(HeadMix(3)(maps), maps)


def test_head_mix_is_a_1x1_convolution_over_heads() -> None:
    mix = HeadMix(3).double()
    nn.init.normal_(mix.weight)
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(mix(maps), F.conv2d(maps, mix.weight[:, :, None, None]))


def test_token_convolution_starts_as_the_identity() -> None:
    x = torch.randn(2, 1 + 12, 6)
    assert torch.equal(TokenConvolution(6, 3, grid_size=(3, 4), num_prefix_tokens=1)(x), x)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_token_convolution_moves_patches_by_hand(prefix: int) -> None:
    """A kernel whose only weight lies right of its centre adds each patch's right neighbour."""
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
    """Against a plain loop over heads, in float64, with mixes that are no identity."""
    attn = tiny().blocks[0].attn.double()  # type: ignore[index, union-attr]
    mixed = MixedAttention(attn)
    for mix in (mixed.mix_logits, mixed.mix_probs):
        nn.init.normal_(mix.weight)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    q, k, v = attn.qkv(x).reshape(2, 7, 3, 3, 8).unbind(2)
    logits = [q[:, :, h] @ k[:, :, h].transpose(1, 2) / 8**0.5 for h in range(3)]
    probs = [sum(mixed.mix_logits.weight[g, h] * logits[h] for h in range(3)).softmax(-1) for g in range(3)]
    heads = [sum(mixed.mix_probs.weight[g, h] * probs[h] for h in range(3)) @ v[:, :, g] for g in range(3)]
    torch.testing.assert_close(mixed(x), attn.proj(torch.cat(heads, dim=-1)))


def test_mixed_attention_keeps_masked_places_masked() -> None:
    mixed = MixedAttention(tiny().blocks[0].attn)  # type: ignore[index, union-attr]
    nn.init.normal_(mixed.mix_logits.weight)
    x = torch.randn(1, 6, 24)
    changed = x.clone()
    changed[:, 3:] += 1.0
    assert torch.equal(mixed(x, is_causal=True)[:, :3], mixed(changed, is_causal=True)[:, :3])
