"""Small models and images, and the command line in this process."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one process per core, and so one thread in each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from tests.factories import ARGS, ROWS, VARIANTS, tiny
from vitcompress.cli.app import main
from vitcompress.measure.latency import measure_speed

ARCHITECTURE = VARIANTS["vit"][0]


@dataclass(frozen=True)
class Ended:
    """How a call of the command line ended."""

    code: int
    out: str
    err: str


Vitcompress = Callable[..., Ended]


def model_flags(**changed: Any) -> list[str]:
    return [word for key, value in {**ARGS, **changed}.items() for word in ("--model-arg", f"{key}={value}")]


def draw_image(path: Path, seed: int, *, size: tuple[int, int] = (40, 36)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Of the models that the tests of every family run over, those that `make test` takes.
FAST_ROWS = {
    "vit", "deit distilled", "siglip", "headless tokens", "swin", "swin v2", "beit", "eva02",
    "dinov3 swiglu", "pe core",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as thorough most models of `ROWS`, and all cases of a broad test but the first."""
    started: set[Any] = set()
    for item in items:
        row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
        name = row if isinstance(row, str) else next((name for name, known in ROWS.items() if known is row), None)
        if name in ROWS and name not in FAST_ROWS:
            item.add_marker("thorough")
        elif item.get_closest_marker("broad"):
            function = getattr(item, "function", None)
            if function in started:
                item.add_marker("thorough")
            started.add(function)


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time latencies with three pairs of forward passes instead of fifty."""
    defaults = measure_speed.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "budget_seconds", 0.0)


@pytest.fixture
def vitcompress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Vitcompress:
    """Call the console script in this process; an exception that it lets out fails the test."""

    def call(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["vitcompress", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        captured = capsys.readouterr()
        return Ended(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state dict of `tiny()` as a safetensors file."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(tiny().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def teacher(weights: Path) -> list[str]:
    """MODEL and the flags that make it `tiny()`."""
    return [ARCHITECTURE, *model_flags(), "--checkpoint", str(weights)]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` with three and `val/` with two images in each of five class folders."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ape", "bee", "cat", "dog", "eel")):
            for number in range(count):
                draw_image(root / split / name / f"{number}.png", 10 * label + number)
    return root


@pytest.fixture(scope="session")
def regrouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of three other classes than `images` has, with train/ and val/."""
    root = tmp_path_factory.mktemp("regrouped")
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("red", "green", "blue")):
            for number in range(count):
                draw_image(root / split / name / f"{number}.png", 100 + 10 * label + number)
    return root


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in one folder, without labels."""
    root = tmp_path_factory.mktemp("flat")
    for number in range(12):
        draw_image(root / f"{number:02}.png", number)
    return root


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, teacher: Sequence[str], images: Path) -> Path:
    """A folder with what `compress --steps 0` wrote: mini.safetensors and its two reports."""
    folder = tmp_path_factory.mktemp("made")
    words = ["compress", *teacher, "--data", images, "--share", 2, "--steps", 0, "--num-workers", 0, "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vitcompress", *map(str, words), "--out", str(folder / "mini.safetensors")])
        with pytest.raises(SystemExit, match="0"):
            main()
    return folder


@pytest.fixture
def mini(made: Path, tmp_path: Path) -> Path:
    """A copy of the artifact for a test to harm, alone in its folder."""
    (tmp_path / "artifact").mkdir()
    return Path(shutil.copy(made / "mini.safetensors", tmp_path / "artifact"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub client fails at once, as it does without a network after all its retries."""

    def fail(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("cannot reach huggingface.co")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
