"""Where a cache cannot be written to, the hint names the variable that moves it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.conftest import Vitcompress, draw_image
from vitcompress.runtime.caches import cache_hint


def failed(number: int, path: Path | str | None) -> OSError:
    return OSError(number, "it failed", None if path is None else str(path))


@pytest.mark.parametrize(("variable", "other"), [("HF_HOME", "TORCH_HOME"), ("TORCH_HOME", "HF_HOME")])
def test_the_cache_and_its_variable_are_named(
    variable: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    monkeypatch.setenv(other, str(tmp_path / "other"))
    expected = f"The cache {tmp_path / 'cache'} cannot be written to: set {variable} to a folder with room for it."
    for path in (tmp_path / "cache", tmp_path / "cache" / "hub" / "model"):
        assert cache_hint(failed(errno.EROFS, path)) == expected
    wrapped = RuntimeError("a library's own error")
    wrapped.__cause__ = failed(errno.EACCES, tmp_path / "cache" / "x")
    assert cache_hint(wrapped) == expected


def test_other_errors_have_other_hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert cache_hint(failed(errno.EACCES, tmp_path / "images" / "train.parquet")) == ""
    assert cache_hint(failed(errno.ENOENT, tmp_path / "cache" / "x")) == ""
    assert cache_hint(ConnectionError("no network")) == ""


def test_a_data_set_without_a_cache_names_the_variable(
    vitcompress: Vitcompress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="the reader is an extra")
    draw_image(tmp_path / "a.png", 0)
    cell = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_list([{"image": cell}]).to_parquet(tmp_path / "table" / "train.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "a.png" / "cache"))
    ended = vitcompress("plan", "deit_tiny", "--calibrate", f"hfds:{tmp_path / 'table'}")
    assert ended.code == 2
    assert f"The cache {tmp_path / 'a.png' / 'cache'} cannot be written to" in ended.err
    assert "HF_HOME or HF_DATASETS_CACHE" in ended.err


def test_a_download_without_a_cache_names_the_variable(
    vitcompress: Vitcompress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **how: object) -> None:
        raise failed(errno.EROFS, tmp_path / "cache" / "hub")

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    for words in (["report", "hf-hub:someone/model"], ["plan", "hf-hub:someone/model"]):
        ended = vitcompress(*words)
        assert ended.code == 2
        assert f"The cache {tmp_path / 'cache'} cannot be written to: set HF_HOME" in ended.err
