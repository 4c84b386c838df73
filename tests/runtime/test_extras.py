"""A folder that happens to be named like a package is none."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tests.conftest import Vitcompress
from vitcompress.errors import DataError
from vitcompress.runtime import extras
from vitcompress.runtime.extras import EXTRAS, install_hint, missing_packages, require_extra


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which packages are searched for, as by `python -m` in it."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr("sys.meta_path", [importlib.machinery.PathFinder])
    for name in {package for packages in EXTRAS.values() for package in packages}:
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize("extra", list(EXTRAS))
def test_a_folder_of_its_name_is_no_package(extra: str, alone: Path) -> None:
    for package in EXTRAS[extra]:
        (alone / package / "run-1").mkdir(parents=True)
    importlib.invalidate_caches()
    assert missing_packages(extra) == list(EXTRAS[extra])
    assert f"(The folder {alone / EXTRAS[extra][0]} is no package.)" in install_hint(extra)
    with pytest.raises(DataError, match=" and ".join(EXTRAS[extra])) as caught:
        require_extra(extra, "--what", DataError)
    assert "is no package" in caught.value.hint


def test_a_package_is_one_with_or_without_an_init(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone / "wandb").mkdir()
    (alone / "wandb" / "__init__.py").touch()
    (alone / "executorch").mkdir()
    importlib.invalidate_caches()
    assert missing_packages("wandb") == []
    assert missing_packages("executorch") == ["executorch"]
    monkeypatch.setattr(extras, "distribution", lambda name: Distribution.at(alone))
    assert missing_packages("executorch") == []


def test_without_a_folder_only_the_package_is_named(alone: Path) -> None:
    assert missing_packages("wandb") == ["wandb"]
    assert install_hint("wandb") == "pip install 'vitcompress[wandb]'"


def test_a_tracker_that_is_only_a_folder_is_refused(
    vitcompress: Vitcompress, teacher: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not missing_packages("wandb"):
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["compress", *teacher, "--data", images, "--share", 2, "--log-with", "wandb", "--steps", 2]
    ended = vitcompress(*words, "--out", tmp_path / "a.safetensors")
    assert ended.code == 2
    assert "--log-with wandb: it is not installed." in ended.err
    assert f"The folder {tmp_path / 'wandb'} is no package." in ended.err.replace("\n", " ")
    assert not (tmp_path / "a.safetensors").exists()
