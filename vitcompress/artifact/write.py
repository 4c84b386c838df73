"""Write an artifact, and check that it gives the student back before it takes its place."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vitcompress.artifact.atomic import replacing
from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.load import load
from vitcompress.artifact.manifest import Manifest, to_tree
from vitcompress.artifact.read import file_digest
from vitcompress.errors import ArtifactError
from vitcompress.quantize.store import stored_tensors


def write(
    path: Path,
    student: nn.Module,
    manifest: Manifest,
    probe: Tensor,
    *,
    stored: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a student to a file, load it from there, and compare the two.

    If they differ, the file that was at `path` before stays.

    Args:
        path: path of the artifact; its folder exists.
        student: the model, on any device, in eval mode.
        manifest: description of the student, for the header.
        probe: images `[B, C, H, W]` to compare logits on.
        stored: tensors in the manifest's store that the student was rounded to; None to store the
            student as it is.

    Raises:
        ArtifactError: the folder cannot be written to, or the file does not give the student back.
    """
    tree = to_tree(manifest)
    stored = stored_tensors(student, manifest.store) if stored is None else stored
    tensors = {name: t.detach().cpu().contiguous() for name, t in stored.items()}
    with replacing(path) as temporary:
        try:
            text = json.dumps({**tree, "sha256": file_digest(tree, sha256_of(tensors))}, sort_keys=True)
            save_file(tensors, temporary, metadata={"vitcompress": text})  # safetensors keeps no order of several keys
        except SafetensorError as error:
            raise ArtifactError(f"{path}: cannot be written: {error}.") from error
        verify(load(temporary), student, probe)


def verify(loaded: nn.Module, student: nn.Module, probe: Tensor) -> None:
    """Check that two models give the same logits, to the last bit.

    Args:
        loaded: model on CPU, in eval mode.
        student: model on any device, in eval mode; a copy of it runs on CPU, since devices round
            differently.
        probe: images `[B, C, H, W]`.

    Raises:
        ArtifactError: logits differ, or are not finite.
    """
    on_cpu = all(tensor.device.type == "cpu" for tensor in student.state_dict().values())
    student = student if on_cpu else copy.deepcopy(student).cpu()
    with torch.inference_mode():
        expected, logits = student(probe.cpu()), loaded(probe.cpu())
    if not bool(torch.isfinite(expected).all()):
        raise ArtifactError("The student's logits are not finite: nothing was written.")
    difference = float((expected - logits).abs().max())
    if difference != 0:
        raise ArtifactError(f"The file does not give the student back: logits differ by {difference:g}.")
