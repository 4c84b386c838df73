"""Narrow heads attend as their formula says, whatever the widths of queries and values."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from tests.factories import tiny
from vitcompress.families.narrow import narrow_block
from vitcompress.families.vit import VIT
from vitcompress.families.widths import Widths


@pytest.mark.parametrize(("qk", "v"), [(3, 7), (7, 3), (4, 4), (None, 3), (3, None)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_changes_nothing(qk: int | None, v: int | None, is_causal: bool) -> None:
    block: Any = tiny().blocks[0]  # type: ignore[index]
    narrow_block(block, Widths(qk=qk, v=v), VIT.narrow_attention)
    attn, x = block.attn.double(), torch.randn(2, 5, block.attn.qkv.in_features, dtype=torch.double)
    heads, value_width = attn.num_heads, v or attn.head_dim
    q, k, values = attn.qkv(x).split([heads * (qk or attn.head_dim)] * 2 + [heads * value_width], -1)
    q, k, values = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, values))
    logits = q @ k.mT * attn.scale
    if is_causal:
        logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = attn.proj((logits.softmax(-1) @ values).transpose(1, 2).flatten(2))
    with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as fused:
        torch.testing.assert_close(attn(x, is_causal=is_causal), expected)
    widths = {t.shape[-1] for t in fused.call_args.args}
    assert len(widths) == 1, "attention is fused where all widths are equal"
