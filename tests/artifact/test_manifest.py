"""Manifests are read without torch and timm; timm's registry is asked before a model is built."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vitcompress as package
from tests.artifact.helpers import write_student
from tests.conftest import Vitcompress
from tests.factories import images as noise
from vitcompress.artifact.read import read_manifest
from vitcompress.artifact.write import write
from vitcompress.errors import ArtifactError
from vitcompress.families.outputs import CLASSES, MULTI_LABEL, outputs_of

READ = """
import sys
from pathlib import Path
from vitcompress.artifact.hub import locate
from vitcompress.artifact.read import read_manifest
assert read_manifest(locate(Path(sys.argv[1]))).plan.groups
heavy = ("accelerate", "matplotlib", "numpy", "safetensors", "timm", "torch", "torchvision")
print(*(name for name in heavy if name in sys.modules))
"""


def test_reading_a_manifest_imports_no_torch(tmp_path: Path) -> None:
    write_student(tmp_path / "m.safetensors", share=2)
    words = [sys.executable, "-c", READ, str(tmp_path / "m.safetensors")]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout.split() == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "resnet50", "resnet50 is not a model of a supported family"),
        ("name", "../teacher.safetensors", "not one of timm's models"),
        ("pretrained_cfg", {"weights": "/etc/passwd"}, "has no field 'weights'"),
    ],
)
def test_a_source_that_timm_does_not_have_is_shown_but_not_built(
    field: str, value: Any, message: str, mini: Path, images: Path, tmp_path: Path,
    vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    manifest, student = read_manifest(mini), package.load(mini)
    odd = dataclasses.replace(manifest, source={**manifest.source, field: value})
    file = tmp_path / "odd.safetensors"
    with monkeypatch.context() as unchecked:
        unchecked.setattr("vitcompress.artifact.write.load", lambda path: student)
        write(file, student, odd, noise(student))
    monkeypatch.setattr("timm.create_model", lambda *args, **kwargs: pytest.fail("a model was built"))
    assert vitcompress("report", file).code == 0
    with pytest.raises(ArtifactError, match=message):
        package.load(file)
    data = ["--data", images, "--num-workers", 0]
    for words in (
        ["evaluate", file, *data],
        ["export", file, "--to", "pt2", "--out", tmp_path / "m.pt2"],
        ["finetune", file, *data, "--steps", 1, "--out", tmp_path / "new.safetensors"],
    ):
        ended = vitcompress(*words)
        assert (ended.code, message in ended.err) == (2, True), ended
    assert not list(tmp_path.glob("m.pt2")) + list(tmp_path.glob("new.*"))


def test_the_kind_of_outputs_is_stored_and_older_files_tell_none(tmp_path: Path) -> None:
    student, _ = write_student(tmp_path / "m.safetensors", share=2)
    manifest = read_manifest(tmp_path / "m.safetensors")
    assert "outputs" not in manifest.source
    assert outputs_of(package.load(tmp_path / "m.safetensors")) is CLASSES
    told = dataclasses.replace(manifest, source={**manifest.source, "outputs": "multi_label"})
    write(tmp_path / "told.safetensors", student, told, noise(student))
    assert outputs_of(package.load(tmp_path / "told.safetensors")) is MULTI_LABEL
    odd = dataclasses.replace(manifest, source={**manifest.source, "outputs": "poems"})
    with pytest.raises(ArtifactError, match="outputs"):
        write(tmp_path / "odd.safetensors", student, odd, noise(student))
