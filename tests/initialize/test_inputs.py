"""Parts of blocks run as whole blocks do, and no further than needed."""

from __future__ import annotations

import torch
from torch import nn

from tests.factories import tiny
from vitcompress.initialize.inputs import BlockInput, run_block, run_part


def test_a_part_is_run_as_in_the_whole_block_and_no_further() -> None:
    block: nn.Module = tiny("layer-scale").get_submodule("blocks.1")
    given = BlockInput(torch.randn(2, 17, 24), (), {})
    later = list[str]()
    for name in ("mlp.fc1", "mlp.fc2"):
        block.get_submodule(name).register_forward_hook(lambda m, args, output, n=name: later.append(n))
    calls = run_part(block, given, ["attn.qkv", "attn.proj"])
    assert list(calls) == ["attn.qkv", "attn.proj"]
    assert not later
    run_part(block, given, ["norm2", "mlp.fc1"])
    assert later == ["mlp.fc1"]
    whole, output = run_block(block, given, ["attn.qkv", "attn.proj"])
    for name, call in calls.items():
        assert torch.equal(call.input, whole[name].input)
        assert torch.equal(call.output, whole[name].output)
    assert output.shape == given.x.shape
    assert not block.get_submodule("attn.qkv")._forward_hooks
