"""What the docs say about ONNX Runtime's dynamic quantization of an exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export.test_export import with_onnx, write
from tests.factories import ROWS
from vitcompress import export


def outputs(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    channels, side, _ = session.get_inputs()[0].shape[1:]
    images = np.random.default_rng(0).normal(size=(4, channels, side, side)).astype(np.float32)
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@with_onnx
@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # of onnxruntime
@pytest.mark.parametrize("store", ["source", "fp16", "int8"])
def test_floating_files_can_be_quantized_again_and_codes_cannot(store: str, tmp_path: Path) -> None:
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    written = write(tmp_path / "m.safetensors", ROWS["vit"], store, share=2, transforms=())
    plain, prepared, dynamic = (tmp_path / f"{name}.onnx" for name in ("plain", "prepared", "dynamic"))
    export.export(written, "onnx", plain)
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    quantize_dynamic(str(prepared), str(dynamic), op_types_to_quantize=["MatMul"])
    kinds = [node.op_type for node in onnx.load(dynamic).graph.node]
    before, after = outputs(plain), outputs(dynamic)
    if store == "int8":
        assert "MatMulInteger" not in kinds
        assert np.array_equal(before, after)
        with pytest.raises(ValueError, match="DequantizeLinear to be an initializer"):
            quantize_dynamic(str(plain), str(dynamic))
    else:
        assert kinds.count("MatMulInteger") > 4
        assert 0 < np.abs(before - after).max() < 0.1 * before.std()
