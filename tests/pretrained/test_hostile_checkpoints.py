"""A checkpoint that means harm is refused at once, and nothing in it is run; what is written is whole or not there."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vitcompress as package
from tests.conftest import ARCHITECTURE, Ended, Vitcompress, listing, model_flags
from tests.tiny import tiny
from vitcompress.artifact import atomic
from vitcompress.artifact.atomic import replacing
from vitcompress.artifact.write import verify
from vitcompress.errors import ArtifactError, CheckpointError
from vitcompress.pretrained.weightfiles import read_weights

# --- checkpoints


def mistake(ended: Ended, *named: object) -> None:
    assert ended.code == 2, ended.err
    for each in named:
        assert str(each) in ended.err.replace("\n", "")
    assert "Traceback" not in ended.err


def compress(vitcompress: Vitcompress, checkpoint: Path, out: Path) -> Ended:
    words = [ARCHITECTURE, *model_flags(), "--checkpoint", checkpoint, "--start", "first", "--steps", 0, "--out", out]
    return vitcompress("compress", *words)


def packed(path: Path, *, size: int) -> None:
    """A checkpoint of torch's whose pickle is followed by zeros, compressed."""
    torch.save(tiny().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in names.items():
            archive.writestr(name, content + bytes(size if name.endswith("data.pkl") else 0))


def overlapping(path: Path) -> None:
    """An archive whose list names the same bytes a thousand times."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(100_000))
        only = archive.infolist()[0]
        archive.filelist.extend([only] * 1000)
    path.write_bytes(whole.getvalue())


def ended_oddly(path: Path) -> None:
    """A packed checkpoint whose end zipfile cannot make out, and torch can."""
    packed(path, size=200 << 20)
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    data[end + 20 : end + 22] = (4).to_bytes(2, "little")
    path.write_bytes(bytes(data) + b"PK\5\6")


def swollen(path: Path) -> None:
    """One number that is seen as a matrix of a terabyte."""
    weights = dict(tiny().state_dict())
    weights["head.weight"] = torch.zeros(1).expand(1 << 19, 1 << 19)
    torch.save(weights, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: packed(path, size=200 << 20), "packed into"),
        (overlapping, "packed into"),
        (ended_oddly, "cannot be read"),
        (swollen, "larger than the file: head.weight"),
    ],
    ids=["compressed", "overlapping", "ended-oddly", "expanded"],
)
def test_a_checkpoint_larger_than_its_file_is_refused_before_it_is_unpacked(
    make: Callable[[Path], None], message: str, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    make(tmp_path / "w.pth")
    mistake(compress(vitcompress, tmp_path / "w.pth", tmp_path / "m.safetensors"), f"{tmp_path / 'w.pth'}", message)
    assert not (tmp_path / "m.safetensors").exists()


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.zeros(5).to_sparse(),
    "rows": lambda: torch.zeros(5, 24).to_sparse_csr(),
    "meta": lambda: torch.zeros(5, device="meta"),
    "complex": lambda: torch.zeros(5, dtype=torch.complex64),
    "bool": lambda: torch.zeros(5, dtype=torch.bool),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Validating sparse")
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_is_no_plain_table_is_named(kind: str, tmp_path: Path) -> None:
    torch.save({**tiny().state_dict(), "head.bias": ODD[kind]()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"no plain tables.*head\.bias"):
        read_weights(tmp_path / "w.pth")


def test_weights_that_are_not_finite_are_named(tmp_path: Path, vitcompress: Vitcompress) -> None:
    torch.save({**tiny().state_dict(), "head.bias": torch.full((5,), torch.nan)}, tmp_path / "w.pth")
    mistake(compress(vitcompress, tmp_path / "w.pth", tmp_path / "m.safetensors"), "not finite: head.bias")


def test_a_compressed_checkpoint_in_a_local_folder_is_refused(tmp_path: Path, vitcompress: Vitcompress) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(f'{{"architecture": "{ARCHITECTURE}"}}')
    packed(tmp_path / "m/pytorch_model.bin", size=20 << 20)
    mistake(vitcompress("plan", f"local-dir:{tmp_path / 'm'}"), "pytorch_model.bin", "packed into")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_named_pipe_is_not_waited_on(suffix: str, tmp_path: Path, vitcompress: Vitcompress) -> None:
    os.mkfifo(tmp_path / f"w.{suffix}")
    ended = compress(vitcompress, tmp_path / f"w.{suffix}", tmp_path / "m.safetensors")
    mistake(ended, tmp_path / f"w.{suffix}", "no regular file")
    with pytest.raises(ArtifactError, match="is not a file"):
        package.load(tmp_path / f"w.{suffix}")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_named_pipe_in_a_local_folder_is_not_waited_on(name: str, tmp_path: Path, vitcompress: Vitcompress) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(f'{{"architecture": "{ARCHITECTURE}"}}')
    (tmp_path / "m" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "m" / name)
    mistake(vitcompress("plan", f"local-dir:{tmp_path / 'm'}"), name, "no regular file")
    mistake(compress(vitcompress, tmp_path / "m", tmp_path / "x.safetensors"), name, "no regular file")


def test_links_are_followed_to_files_and_nowhere_else(tmp_path: Path, vitcompress: Vitcompress) -> None:
    save_file(tiny().state_dict(), tmp_path / "real.safetensors")
    (tmp_path / "good.safetensors").symlink_to("real.safetensors")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors").mkdir()
    out = tmp_path / "m.safetensors"
    for name in ("gone", "loop", "device", "folder"):
        mistake(compress(vitcompress, tmp_path / f"{name}.safetensors", out), tmp_path / f"{name}.safetensors")
    assert compress(vitcompress, tmp_path / "good.safetensors", out).code == 0


class Runs:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_the_name_of_safetensors_is_not_run(tmp_path: Path, vitcompress: Vitcompress) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(pickle.dumps(Runs(tmp_path / "it-ran")))
    mistake(compress(vitcompress, path, tmp_path / "m.safetensors"), path)
    with pytest.raises(ArtifactError):
        package.load(path)
    assert not (tmp_path / "it-ran").exists()


# --- writing

WRITE = """
    import sys
    from pathlib import Path
    from tests.artifact.helpers import write_student
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
    """A file system of 64 kB, which is less than the artifact takes; mounted, so for root only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if not made or made.returncode:
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
        replacing(small_disk / "m.safetensors") as beside,
    ):
        beside.write_bytes(b"new")
    assert listing(small_disk) == {"m.safetensors": b"old"}


@pytest.mark.parametrize("name", ["m.safetensors", "m.report.json", "m.report.md"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_at_the_last_moment_leaves_the_old_file(
    code: int, name: str, tmp_path: Path, teacher: list[str], vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems say only when a file is flushed, or moved, that there is no room for it."""
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
    folder = tmp_path / "folder"
    folder.mkdir()

    def vanish(loaded: nn.Module, student: nn.Module, probe: torch.Tensor) -> None:
        verify(loaded, student, probe)
        shutil.rmtree(folder)

    monkeypatch.setattr("vitcompress.artifact.write.verify", vanish)
    ended = vitcompress("compress", *teacher, "--start", "first", "--steps", 0, "--out", folder / "m.safetensors")
    mistake(ended, folder / "m.safetensors", "No such file")
    assert not folder.exists()
