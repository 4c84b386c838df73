"""What is exported?  An artifact, the model in it, and its tensors as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from vitcompress.artifact.load import load
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.read import read_manifest
from vitcompress.quantize.codecs import num_bytes


@dataclass(frozen=True)
class Subject:
    """An artifact that becomes another file.

    Attributes:
        path: where it lies.
        manifest: what it says of itself.
        student: the model, in eval mode on CPU, all numbers floating; what an export is held against.
        tensors: what the file holds, by donor's names, codes and scales as they are.
    """

    path: Path
    manifest: Manifest
    student: nn.Module
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, path: Path) -> Subject:
        """Read an artifact.

        Raises:
            ArtifactError: missing, cut short, altered, of a newer format, or not an artifact.
        """
        student = load(path).requires_grad_(False)
        return cls(path, read_manifest(path), student, load_file(path))

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, rows, columns) of an image."""
        channels, rows, columns = self.manifest.data_config["input_size"]
        return channels, rows, columns

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors as they are stored, each shared one once."""
        return num_bytes(self.tensors)


@dataclass(frozen=True)
class Exported:
    """What became of an artifact, and how it was verified.

    Attributes:
        format: a key of `vitcompress.export.FORMATS`.
        out: the file or folder.
        out_bytes: of the file, or of all files in the folder.
        artifact_bytes: of the artifact's file.
        tensor_bytes: of the numbers in what was written; a file adds its structure to them.
        images: what outputs were compared on.
        num_images: how many.
        max_difference: the largest difference of any output from the artifact's.
        largest_output: the largest absolute output of the artifact, which that is to be seen against.
        same_top1: images of which both have the same most likely class; None where the model has no classes.
        notes: what a user of the result should know.
    """

    format: str
    out: str
    out_bytes: int
    artifact_bytes: int
    tensor_bytes: int
    images: str
    num_images: int
    max_difference: float
    largest_output: float
    same_top1: int | None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What was done, in sentences."""
        size = f"{self.out}: {self.out_bytes:,} bytes (the artifact has {self.artifact_bytes:,}), verified"
        same = (
            "" if self.same_top1 is None else f"; the same most likely class on {self.same_top1} of {self.num_images}"
        )
        apart = f"outputs differ by {self.max_difference:.2g} at most, of up to {self.largest_output:.3g}"
        return [f"wrote {size}", f"{apart}, on {self.images}{same}", *self.notes]
