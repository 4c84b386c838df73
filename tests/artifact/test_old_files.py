"""Files that version 0.1.0 wrote still give their outputs, and every command reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vitcompress as package
from tests.conftest import Vitcompress
from vitcompress.runtime.extras import missing_packages

HERE = Path(__file__).parent / "files-0.1"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "artifacts-0.1"  # more of them, on some machines
FILES = {path.stem: path for folder in (SHARED, HERE) for path in sorted(folder.glob("*.safetensors"))}
with_each_file = pytest.mark.parametrize("file", FILES.values(), ids=FILES.keys())


def test_the_files_in_the_repository_are_of_three_families() -> None:
    assert len(list(HERE.glob("*.safetensors"))) == 3
    assert all(path.with_suffix(".expected").is_file() for path in FILES.values())


@pytest.mark.broad
@with_each_file
@pytest.mark.parametrize("keep_quantized", [False, True])
def test_an_old_file_gives_the_outputs_it_gave(file: Path, keep_quantized: bool) -> None:
    expected = load_file(file.with_suffix(".expected"))
    with torch.inference_mode():
        outputs = package.load(file, keep_quantized=keep_quantized)(expected["images"])
    assert outputs.shape == expected["outputs"].shape
    assert float((outputs - expected["outputs"]).abs().max()) <= 1e-5 * float(expected["outputs"].abs().max())


@with_each_file
def test_commands_read_an_old_file(file: Path, vitcompress: Vitcompress) -> None:
    other = next(iter(FILES.values()))
    for words in (["report", file], ["check", file, "--min-ratio", 1], ["compare", file, other], ["diff", file, other]):
        ended = vitcompress(*words)
        assert (ended.code, ended.err) == (0, ""), ended
    report = json.loads(vitcompress("report", file, "--json").out)
    assert report["size"]["params_ratio"] > 1
    assert vitcompress("check", file, "--min-ratio", 1000).code == 3


@pytest.mark.thorough
@pytest.mark.skipif(bool(missing_packages("onnx")), reason="the extra onnx is not installed")
@with_each_file
def test_an_old_file_becomes_onnx(file: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    out = tmp_path / "m.onnx"
    ended = vitcompress("export", file, "--to", "onnx", "--out", out, "--num-images", 4, "--json", "--quiet")
    assert ended.code == 0, ended
    done = json.loads(ended.out)
    assert done["max_difference"] <= 1e-4 * done["largest_output"]
    assert out.stat().st_size == done["out_bytes"]
