"""Artifacts are loaded from files, folders and the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import vitcompress as package
from tests.conftest import Vitcompress
from vitcompress.errors import ArtifactError


@pytest.fixture
def folder(mini: Path) -> Path:
    """A folder with the artifact in it, as on the Hub."""
    (mini.parent / "repo").mkdir()
    shutil.copy(mini, mini.parent / "repo" / "model.safetensors")
    return mini.parent / "repo"


def test_a_folder_is_the_file_in_it(mini: Path, folder: Path) -> None:
    from_file, from_folder = package.load(mini).state_dict(), package.load(str(folder)).state_dict()
    assert all(torch.equal(t, from_file[name]) for name, t in from_folder.items())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"a folder without model\.safetensors"):
        package.load(folder)


@pytest.mark.parametrize(("name", "revision"), [("hf-hub:me/mini", None), ("hf-hub:me/mini@v2", "v2")])
def test_the_hub_is_asked_for_the_file(
    name: str, revision: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(repo: str, file: str, *, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = package.load(name)
    assert asked == [("me/mini", "model.safetensors", revision)]
    assert not model.training


def test_what_the_hub_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise OSError("404 Client Error.\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ArtifactError, match=r"hf-hub:me/mini cannot be downloaded: 404 Client Error\.$") as error:
        package.load("hf-hub:me/mini")
    assert "hf auth login" in error.value.hint


def test_commands_take_a_folder(folder: Path, images: Path, vitcompress: Vitcompress, no_network: None) -> None:
    data = ["--data", images, "--num-workers", 0]
    for words in (["report"], ["check", "--min-ratio", 1], ["evaluate", *data], ["compare", folder], ["diff", folder]):
        ended = vitcompress(*words, folder)
        assert ended.code == 0, ended
    both = json.loads(vitcompress("compare", folder, folder, "--json").out)
    assert [row["file"] for row in both] == ["repo", "repo"]
    ended = vitcompress("report", folder, "--html", folder / "model.safetensors")
    assert (ended.code, "would overwrite" in ended.err) == (2, True)
