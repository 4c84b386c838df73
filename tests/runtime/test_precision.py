"""The precision that `auto` stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitcompress.recipe import RunRecipe
from vitcompress.runtime.precision import precision_of


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True}, "bf16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "avx512_fp16": True, "amx_bf16": False}, "fp32"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "avx512_fp16": True}, "bf16"),
        ({"avx512_f": True}, "fp32"),
        (None, "fp32"),
    ],
)
def test_auto_precision_is_bf16_where_the_cpu_is_faster_in_it(
    capabilities: dict[str, Any] | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if capabilities is None:  # torch 2.9
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision_of(RunRecipe(device="cpu")) == precision
    assert precision_of(RunRecipe(device="cpu", precision="fp32")) == "fp32"


def test_auto_precision_is_bf16_where_the_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert precision_of(RunRecipe()) == precision
