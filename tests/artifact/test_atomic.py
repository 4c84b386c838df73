"""Files are written completely or not at all, however the writing ends."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitcompress as package
from tests.conftest import Ended, Vitcompress, listing
from vitcompress.artifact import atomic
from vitcompress.artifact import write as module
from vitcompress.errors import ArtifactError


def mistake(ended: Ended, *named: object) -> None:
    assert ended.code == 2, ended.err
    for text in named:
        assert str(text) in ended.err.replace("\n", "")
    assert "Traceback" not in ended.err


WRITE = """
    import sys
    from pathlib import Path
    from tests.artifact.test_artifact import write_student
    folder, share = Path(sys.argv[1]), int(sys.argv[2])
    (folder / f"ready{share}").touch()
    while not (folder / "go").exists():
        pass
    for _ in range(5):
        write_student(folder / "m.safetensors", share=share)
"""


@pytest.mark.slow
def test_two_runs_that_write_one_file_leave_a_whole_file_of_one_of_them(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITE), str(tmp_path), str(share)]) for share in (2, 4)
    ]
    while not all((tmp_path / f"ready{share}").exists() for share in (2, 4)):
        assert all(run.poll() in (None, 0) for run in runs)
    (tmp_path / "go").touch()
    assert [run.wait(300) for run in runs] == [0, 0]
    blocks: Any = package.load(tmp_path / "m.safetensors").get_submodule("blocks")
    assert blocks[0].attn.qkv.weight is blocks[1].attn.qkv.weight
    assert not list(tmp_path.glob(".m*"))


def test_a_file_killed_while_it_is_written_leaves_the_old_one(mini: Path) -> None:
    before = mini.read_bytes()
    script = f"""
        import os, signal
        from pathlib import Path
        from vitcompress.artifact.atomic import replacing
        with replacing(Path({str(mini)!r})) as beside:
            beside.write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == -9
    assert mini.read_bytes() == before
    assert package.load(mini).num_classes == 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 kB, smaller than the artifact; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    mounted = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_file_and_says_so(
    small_disk: Path, teacher: list[str], vitcompress: Vitcompress
) -> None:
    out = small_disk / "m.safetensors"
    out.write_bytes(b"old")
    ended = vitcompress("compress", *teacher, "--share", 1, "--transforms", "none", "--steps", 0, "--out", out)
    mistake(ended, out, "No space left")
    assert listing(small_disk) == {"m.safetensors": b"old"}


def test_a_disk_made_read_only_meanwhile_says_so(small_disk: Path) -> None:
    (small_disk / "m.safetensors").write_bytes(b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with (
        pytest.raises(ArtifactError, match="Read-only"),
        atomic.replacing(small_disk / "m.safetensors") as beside,
    ):
        beside.write_bytes(b"new")
    assert listing(small_disk) == {"m.safetensors": b"old"}


@pytest.mark.broad
@pytest.mark.parametrize("name", ["m.safetensors", "m.report.json", "m.report.md"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_at_the_last_moment_leaves_the_old_file(
    code: int, name: str, tmp_path: Path, teacher: list[str], vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems report a lack of space only when a file is flushed or moved."""
    (tmp_path / name).write_bytes(b"old")
    flush = atomic._flush

    def fail(path: Path) -> None:
        if path.name.startswith(f".{name}"):
            raise OSError(code, os.strerror(code))
        flush(path)

    monkeypatch.setattr(atomic, "_flush", fail)
    words = [*teacher, "--share", 4, "--start", "first", "--steps", 0]
    ended = vitcompress("compress", *words, "--out", tmp_path / "m.safetensors")
    mistake(ended, tmp_path / name, os.strerror(code))
    assert (tmp_path / name).read_bytes() == b"old"
    assert not list(tmp_path.glob(".m*"))


def test_a_folder_that_vanishes_meanwhile_says_so(
    tmp_path: Path, teacher: list[str], vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, verify = tmp_path / "folder", module.verify
    folder.mkdir()

    def vanish(loaded: nn.Module, student: nn.Module, probe: torch.Tensor) -> None:
        verify(loaded, student, probe)
        shutil.rmtree(folder)

    monkeypatch.setattr(module, "verify", vanish)
    ended = vitcompress("compress", *teacher, "--start", "first", "--steps", 0, "--out", folder / "m.safetensors")
    mistake(ended, folder / "m.safetensors", "No such file")
    assert not folder.exists()
