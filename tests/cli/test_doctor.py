"""`vitcompress doctor` says what this machine can do, and breaks over nothing that is missing."""

import builtins
import platform
import tomllib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.conftest import Vitcompress
from vitcompress.cli import doctor
from vitcompress.recipe import RunRecipe
from vitcompress.runtime import extras
from vitcompress.runtime.extras import EXTRAS, missing_packages
from vitcompress.runtime.precision import precision_of

ROOT = Path(__file__).parents[2]
NAMES = [
    "vitcompress", "python", "torch", "packages", "machine", "devices", "precision", "--compile", "extras", "missing",
]  # fmt: skip


def test_ten_lines(vitcompress: Vitcompress) -> None:
    ended = vitcompress("doctor")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    for text in (
        platform.python_version(),
        torch.__version__,
        f"timm {timm.__version__}",
        f"auto is {precision_of(RunRecipe())}; bf16",
    ):
        assert text in ended.out
    assert f"cpu ({torch.get_num_threads()} threads)" in lines[5]


def test_a_missing_extra_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("onnxscript", "wandb") else object())
    found = dict(line.split(maxsplit=1) for line in doctor.lines())
    assert found["extras"] == "datasets, webdataset, executorch, tensorboard"
    assert found["missing"] == (
        "onnxscript (pip install 'vitcompress[onnx]'), wandb (pip install 'vitcompress[wandb]')"
    )
    assert missing_packages("onnx") == ["onnxscript"]


def test_without_torch_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torch":
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found = list(doctor.lines())
    assert [line.split()[0] for line in found] == NAMES
    assert "cannot be imported: libcudart.so.13" in found[2]


@pytest.mark.parametrize(
    ("native", "capability", "said"),
    [
        (True, (9, 0), "auto is bf16; bf16 in hardware, tf32"),
        (False, (7, 5), "auto is fp32; bf16 emulated (slow), no tf32"),
    ],
)
def test_precisions_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, native: bool, capability: tuple[int, int], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    (line,) = [line for line in doctor.lines() if line.startswith("precision")]
    assert line.split(maxsplit=1)[1].startswith(said)


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - {"dev", "docs"}
    for extra, packages in EXTRAS.items():
        assert {requirement.split(">=")[0] for requirement in declared[extra]} == set(packages)
