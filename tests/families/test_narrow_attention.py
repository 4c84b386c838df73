"""Narrow heads attend as their formula says, whatever the widths of queries and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.factories import tiny
from vitcompress.families.narrow import narrow_block
from vitcompress.families.vit import VIT
from vitcompress.families.widths import Widths


def expected_of(attn: Any, x: Tensor, qk: int | None, v: int | None, *, is_causal: bool = False) -> Tensor:
    heads, value_width = attn.num_heads, v or attn.head_dim
    q, k, values = attn.qkv(x).split([heads * (qk or attn.head_dim)] * 2 + [heads * value_width], -1)
    q, k, values = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, values))
    logits = q @ k.mT * attn.scale
    if is_causal:
        logits = logits.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    attended: Tensor = attn.proj((logits.softmax(-1) @ values).transpose(1, 2).flatten(2))
    return attended


def narrow_attention(qk: int | None, v: int | None) -> Any:
    block: Any = tiny().blocks[0]  # type: ignore[index]
    narrow_block(block, Widths(qk=qk, v=v), VIT.narrow_attention)
    return block.attn


def counting_fused() -> Any:
    return patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention)


@pytest.mark.parametrize(("qk", "v"), [(3, 7), (7, 3), (4, 4), (None, 3), (3, None)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_changes_nothing(qk: int | None, v: int | None, is_causal: bool) -> None:
    attn = narrow_attention(qk, v).double()
    x = torch.randn(2, 5, attn.qkv.in_features, dtype=torch.double)
    with counting_fused() as fused:
        torch.testing.assert_close(attn(x, is_causal=is_causal), expected_of(attn, x, qk, v, is_causal=is_causal))
    widths = {t.shape[-1] for t in fused.call_args.args}
    assert len(widths) == 1, "attention is fused where all widths are equal"


@pytest.mark.parametrize(("qk", "v"), [(3, 7), (7, 3), (None, 3), (3, None)])
def test_small_maps_of_unequal_widths_are_plain_products(qk: int | None, v: int | None) -> None:
    attn = narrow_attention(qk, v).eval()
    x = torch.randn(2, 5, attn.qkv.in_features, requires_grad=True)
    expected = expected_of(attn, x, qk, v)
    with counting_fused() as fused:
        found = attn(x)
    assert not fused.called
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(outputs.square().sum(), x)[0] for outputs in (found, expected)]
    torch.testing.assert_close(*grads)


def test_everything_else_stays_fused() -> None:
    attn, even = narrow_attention(3, 7).eval(), narrow_attention(4, 4).eval()
    x = torch.randn(1, 5, attn.qkv.in_features)
    large = torch.randn(1, 420, attn.qkv.in_features)  # 3 · 420² elements
    mask = torch.ones(5, 5).tril().bool()
    runs: list[Callable[[], Tensor]] = [
        lambda: even(x), lambda: attn(large), lambda: attn(x, attn_mask=mask), lambda: attn.train()(x),
    ]  # fmt: skip
    for run in runs:
        with counting_fused() as fused:
            run()
        assert fused.called
    masked = attn.eval()(x, attn_mask=mask)
    torch.testing.assert_close(masked, expected_of(attn, x, 3, 7, is_causal=True))
