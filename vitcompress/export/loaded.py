"""Read an artifact for export: its manifest, its model, and its tensors as they are stored."""

from __future__ import annotations

import json
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
class LoadedArtifact:
    """An artifact to export.

    Attributes:
        path: path of the file.
        manifest: its manifest.
        student: the model, in eval mode on CPU, all numbers floating; the reference for an export's
            outputs.
        tensors: the tensors of the file, by donor's names; quantized ones as codes and scales.
    """

    path: Path
    manifest: Manifest
    student: nn.Module
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> LoadedArtifact:
        """Read an artifact.

        Raises:
            ArtifactError: the file is missing, cut short, altered, of a newer format, or not an
                artifact.
        """
        manifest = read_manifest(path)
        return cls(path, manifest, load(path).requires_grad_(False), load_file(path))

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, rows and columns of an image."""
        channels, rows, columns = self.manifest.data_config["input_size"]
        return channels, rows, columns

    @property
    def data_config_json(self) -> str:
        """Preprocessing of images, as timm's data config in JSON, for the metadata of a file."""
        return json.dumps(dict(self.manifest.data_config))

    @property
    def tensor_bytes(self) -> int:
        """Size of the tensors as they are stored, each shared one once."""
        return num_bytes(self.tensors)
