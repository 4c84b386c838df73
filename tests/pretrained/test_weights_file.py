"""A harmful checkpoint is refused at once, and no code in it runs."""

from __future__ import annotations

import datetime
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vitcompress as package
from tests.conftest import ARCHITECTURE, Ended, Vitcompress, model_flags
from tests.factories import tiny
from vitcompress.errors import ArtifactError, CheckpointError
from vitcompress.pretrained.states import read_weights


def mistake(ended: Ended, *named: object) -> None:
    assert ended.code == 2, ended.err
    for text in named:
        assert str(text) in ended.err.replace("\n", "")
    assert "Traceback" not in ended.err


def compress(vitcompress: Vitcompress, checkpoint: Path, out: Path) -> Ended:
    words = [ARCHITECTURE, *model_flags(), "--checkpoint", checkpoint, "--start", "first", "--steps", 0, "--out", out]
    return vitcompress("compress", *words)


def write_packed(path: Path, *, size: int) -> None:
    """Write a torch checkpoint whose pickle is followed by zeros, compressed."""
    torch.save(tiny().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in names.items():
            archive.writestr(name, content + bytes(size if name.endswith("data.pkl") else 0))


def write_overlapping(path: Path) -> None:
    """Write an archive whose directory lists the same bytes a thousand times."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(100_000))
        only = archive.infolist()[0]
        archive.filelist.extend([only] * 1000)
    path.write_bytes(whole.getvalue())


def write_ended_oddly(path: Path) -> None:
    """Write a packed checkpoint whose end zipfile cannot parse but torch can."""
    write_packed(path, size=200 << 20)
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    data[end + 20 : end + 22] = (4).to_bytes(2, "little")
    path.write_bytes(bytes(data) + b"PK\5\6")


def write_expanded(path: Path) -> None:
    """Write a checkpoint with one number expanded to a matrix of a terabyte."""
    weights = dict(tiny().state_dict())
    weights["head.weight"] = torch.zeros(1).expand(1 << 19, 1 << 19)
    torch.save(weights, path)


@pytest.mark.broad
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: write_packed(path, size=200 << 20), "packed into"),
        (write_overlapping, "packed into"),
        (write_ended_oddly, "cannot be read"),
        (write_expanded, "larger than the file: head.weight"),
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
def test_a_tensor_that_is_not_a_dense_array_is_named(kind: str, tmp_path: Path) -> None:
    torch.save({**tiny().state_dict(), "head.bias": ODD[kind]()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"not dense arrays.*head\.bias"):
        read_weights(tmp_path / "w.pth")


def test_weights_that_are_not_finite_are_named(tmp_path: Path, vitcompress: Vitcompress) -> None:
    torch.save({**tiny().state_dict(), "head.bias": torch.full((5,), torch.nan)}, tmp_path / "w.pth")
    mistake(compress(vitcompress, tmp_path / "w.pth", tmp_path / "m.safetensors"), "not finite: head.bias")


def test_a_compressed_checkpoint_in_a_local_folder_is_refused(tmp_path: Path, vitcompress: Vitcompress) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(f'{{"architecture": "{ARCHITECTURE}"}}')
    write_packed(tmp_path / "m/pytorch_model.bin", size=20 << 20)
    mistake(vitcompress("plan", f"local-dir:{tmp_path / 'm'}"), "pytorch_model.bin", "packed into")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_named_pipe_is_not_waited_on(suffix: str, tmp_path: Path, vitcompress: Vitcompress) -> None:
    os.mkfifo(tmp_path / f"w.{suffix}")
    ended = compress(vitcompress, tmp_path / f"w.{suffix}", tmp_path / "m.safetensors")
    mistake(ended, tmp_path / f"w.{suffix}", "not a regular file")
    with pytest.raises(ArtifactError, match="is not a file"):
        package.load(tmp_path / f"w.{suffix}")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_named_pipe_in_a_local_folder_is_not_waited_on(name: str, tmp_path: Path, vitcompress: Vitcompress) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(f'{{"architecture": "{ARCHITECTURE}"}}')
    (tmp_path / "m" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "m" / name)
    mistake(vitcompress("plan", f"local-dir:{tmp_path / 'm'}"), name, "not a regular file")
    mistake(compress(vitcompress, tmp_path / "m", tmp_path / "x.safetensors"), name, "not a regular file")


@pytest.mark.thorough
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


class CreatesFolder:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_the_name_of_safetensors_is_not_run(tmp_path: Path, vitcompress: Vitcompress) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(pickle.dumps(CreatesFolder(tmp_path / "it-ran")))
    mistake(compress(vitcompress, path, tmp_path / "m.safetensors"), path)
    with pytest.raises(ArtifactError):
        package.load(path)
    assert not (tmp_path / "it-ran").exists()


# --- files under other names, and files of other kinds


@pytest.mark.parametrize("name", ["weights.sf", "weights", "weights.pth", "weights.bin"])
def test_safetensors_are_known_by_their_content(name: str, tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / name)
    assert read_weights(tmp_path / name).tensors.keys() == tiny().state_dict().keys()


def test_a_torch_file_is_known_by_its_content(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").tensors.keys() == tiny().state_dict().keys()


def write_script(path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)


FOREIGN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "w.pt": (write_script, "is a TorchScript archive", "torch.jit.load('w.pt').state_dict()"),
    "w.npz": (lambda path: np.savez_compressed(path, cls=np.zeros(9999)), "packed into", "download it again"),
    "p.npz": (lambda path: np.savez(path, cls=np.array([{}], dtype=object)), "cannot be read", "download it again"),
    "w.onnx": (lambda path: path.write_bytes(bytes(99)), "is a file of ONNX", "Save only the state dict"),
    "w.h5": (lambda path: path.write_bytes(bytes(99)), "is a file of TensorFlow", "Save only the state dict"),
    "w.pth": (lambda path: path.write_text("<!DOCTYPE html>"), "cannot be read: it is neither", "It is a web page"),
    "w.bin": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
        "it is neither",
        "git lfs pull",
    ),
    "w.ckpt": (lambda path: path.write_bytes(bytes(99)), "it is neither", "download it again"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_kind_gets_a_hint_that_fits(name: str, tmp_path: Path) -> None:
    write, message, hint = FOREIGN[name]
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(tmp_path / name)
    assert hint in caught.value.hint


@pytest.mark.parametrize("make", [
    lambda path: torch.save({"model": tiny().state_dict(), "hook": CreatesFolder(path / "it-ran")}, path / "w.pth"),
    lambda path: torch.save(tiny(), path / "w.pth"),
    lambda path: torch.save({"model": tiny().state_dict(), "when": datetime.timedelta(1)}, path / "w.pth"),
    lambda path: (path / "w.pth").write_bytes(pickle.dumps(CreatesFolder(path / "it-ran"))),
], ids=["code", "model", "object", "pickle"])  # fmt: skip
def test_a_pickle_with_code_is_not_run_and_nobody_is_told_to_run_it(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds more than tensors.*not run") as caught:
        read_weights(tmp_path / "w.pth")
    assert "weights_only" not in f"{caught.value} {caught.value.hint}"
    assert "Save only the state dict" in caught.value.hint
    assert not (tmp_path / "it-ran").exists()
