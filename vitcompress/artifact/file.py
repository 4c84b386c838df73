"""What is in the file?  One .safetensors: each shared tensor once, under its donor's name, and JSON in the header.

    {"vitcompress": the manifest, with the digest}

The digest covers the rest of the JSON and every tensor, so an altered file is known for one. Loading runs the same
`apply_plan` that compression ran, on an empty model, then fills the tensors in: no code, no network, no teacher. No
tensor is read before its name, type and shape are those that the plan asks for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vitcompress.artifact.atomic import replacing
from vitcompress.artifact.digest import Digest, sha256_of
from vitcompress.artifact.manifest import Manifest, from_text, to_tree
from vitcompress.artifact.tensorfile import TensorFile, opened
from vitcompress.errors import ArtifactError, shorten
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import input_of
from vitcompress.pretrained.resolve import Source
from vitcompress.quantize.codecs import num_bytes
from vitcompress.quantize.store import fill, layout, stored_tensors
from vitcompress.surgery import apply_plan

# Tables that no file holds (window masks, rotary positions) grow with the image: so many bytes beside the file's own.
_MOST_TIMES_LARGER = 16  # than what it was built for, that images of a model of any size may be
_MOST_TABLE_BYTES = 32 << 20

__all__ = ["Manifest", "empty_student", "header_bytes", "load", "read_manifest", "replacing", "verify", "write"]


def write(
    path: Path,
    student: nn.Module,
    manifest: Manifest,
    probe: Tensor,
    *,
    stored: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `student` to `path`, and make sure that what was written is the student.

    The file is loaded afresh before it takes its place; on a mismatch the old file stays.

    Args:
        path: the target; its folder exists.
        student: on any device, in eval mode.
        manifest: what goes into the header.
        probe: images `[B, C, H, W]` to compare the logits on.
        stored: what the student was rounded to, of the manifest's store; None where that rounds nothing.

    Raises:
        ArtifactError: the folder cannot be written to, or the file does not give the student back.
    """
    tree = to_tree(manifest)
    stored = stored_tensors(student, manifest.store) if stored is None else stored
    tensors = {name: t.detach().cpu().contiguous() for name, t in stored.items()}
    with replacing(path) as beside:
        try:
            text = json.dumps({**tree, "sha256": _digest(tree, sha256_of(tensors))}, sort_keys=True)
            save_file(tensors, beside, metadata={"vitcompress": text})  # one key: safetensors keeps no order of keys
        except SafetensorError as error:
            raise ArtifactError(f"{path}: cannot be written: {error}.") from error
        verify(load(beside), student, probe)


def header_bytes(student: nn.Module, manifest: Manifest) -> int:
    """Bytes of a file beside its tensors, or a few more: their list, the manifest and its digest.

    Args:
        student: meta will do.
        manifest: what would go into the header.
    """
    tree = {**to_tree(manifest), "sha256": "0" * 64}
    stored = stored_tensors(student, manifest.store)
    end = num_bytes(stored)  # no place is longer than the last, in whichever order they come
    tensors = {
        name: {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [end, end]} for name, t in stored.items()
    }
    whole = {"__metadata__": {"vitcompress": json.dumps(tree, sort_keys=True)}, **tensors}
    return 8 + 8 * math.ceil(len(json.dumps(whole, separators=(",", ":"))) / 8)


def verify(loaded: nn.Module, student: nn.Module, probe: Tensor) -> None:
    """Check that two models give the same logits.

    Args:
        loaded: on CPU, in eval mode.
        student: on any device, in eval mode; a copy of it is run on CPU, since devices round each in their own way.
        probe: images `[B, C, H, W]`.

    Raises:
        ArtifactError: they do not, to the last bit.
    """
    on_cpu = all(tensor.device.type == "cpu" for tensor in student.state_dict().values())
    ours = student if on_cpu else copy.deepcopy(student).cpu()
    with torch.inference_mode():
        expected, found = ours(probe.cpu()), loaded(probe.cpu())
    if not bool(torch.isfinite(expected).all()):
        raise ArtifactError("The student's logits are not finite: nothing was written.")
    worst = float((expected - found).abs().max())
    if worst != 0:
        raise ArtifactError(f"The file written does not give the student back: logits differ by {worst:g}.")


def load(path: str | os.PathLike[str], *, keep_quantized: bool = False) -> nn.Module:
    """Load a compressed model: an `nn.Module` in eval mode on CPU, its parameters truly shared.

    Needs no network, no teacher and no further argument. `pretrained_cfg` of the model is timm's data config.

    Args:
        path: a file that `vitcompress compress` wrote.
        keep_quantized: keep int8 and int4 matrices so in memory, each decoded when its layer runs: the same outputs
            from less memory, to run and not to train. By default, and where there are none, all numbers are floating.

    Raises:
        ArtifactError: missing, cut short, altered, of a newer format, or not an artifact.
    """
    path = Path(path)
    with opened(path) as file:
        manifest, tree, digest = _said(file)
        try:
            model = empty_student(path, manifest)
            wrong = _misfits(model, file, manifest.store)
            if wrong:
                raise ArtifactError(f"{path}: tensors that are not those of its plan: {shorten(wrong)}.")
        except ArtifactError:
            _check_digest(file, tree, digest)  # damage is the likelier cause, and the clearer word
            raise
        tensors: dict[str, Tensor] = {}
        _check_digest(file, tree, digest, keep=tensors)
        fill(model, tensors, manifest.store, quantized=keep_quantized)
    model.pretrained_cfg = _pretrained_cfg(model, manifest)  # type: ignore[assignment]
    return model.eval()


def empty_student(path: Path, manifest: Manifest) -> nn.Module:
    """The model that a manifest describes, without its weights.

    Args:
        path: of the artifact.
        manifest: that was read from it.

    Raises:
        ArtifactError: its plan does not fit its model.
    """
    try:
        model = empty_model(Source(**manifest.source))
        with torch.device("meta"):
            apply_plan(model, manifest.plan)
    except Exception as error:  # whatever timm's constructors say of arguments that make no sense
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ArtifactError(f"{path}: its plan does not fit its model: {reason}") from error
    computed = num_bytes({str(id(t)): t for t in model.buffers()})
    if computed > _MOST_TABLE_BYTES + path.stat().st_size:
        raise ArtifactError(f"{path}: its model would compute {computed:,} bytes of tables for its image size.")
    told = tuple(manifest.data_config["input_size"])
    own = input_of(model, told)
    flexible = not getattr(getattr(model, "patch_embed", None), "strict_img_size", True) and told[0] == own[0]
    if told != own and not (flexible and math.prod(told) <= _MOST_TIMES_LARGER * math.prod(own)):
        raise ArtifactError(f"{path}: its images are said to be {told}, and its model takes {own}.")
    return model


def _misfits(model: nn.Module, file: TensorFile, store: str) -> list[str]:
    """Names of tensors that are missing, that nothing asks for, or of another type or shape, in order."""
    expected = layout(model, store)
    fits = {
        name
        for name, (dtypes, shape) in expected.items()
        if (place := file.places.get(name)) and place.dtype in dtypes and place.shape == shape
    }
    return sorted((expected.keys() | file.places.keys()) - fits)


def _pretrained_cfg(model: nn.Module, manifest: Manifest) -> dict[str, Any]:
    """The data config of the student, as timm keeps it, with its classes and no place to fetch the teacher from."""
    labels = {k: v for k, v in manifest.source["pretrained_cfg"].items() if k.startswith("label_")}
    if manifest.classes:
        labels["label_names"] = manifest.classes
    return {
        "architecture": manifest.source["architecture"],
        "num_classes": model.num_classes,
        **labels,
        **manifest.data_config,
    }


def read_manifest(path: Path) -> Manifest:
    """Read what an artifact says of itself, after making sure that it is whole.

    Raises:
        ArtifactError: missing, cut short, altered, of a newer format, or not an artifact.
    """
    with opened(path) as file:
        manifest, tree, digest = _said(file)
        _check_digest(file, tree, digest)
    return manifest


def _said(file: TensorFile) -> tuple[Manifest, dict[str, Any], str]:
    """Manifest, the tree that the digest covers, and the digest, of a file."""
    if "vitcompress" not in file.metadata:
        raise ArtifactError(f"{file.path} is a safetensors file, but none that vitcompress wrote.")
    return from_text(file.path, file.metadata["vitcompress"])


def _check_digest(
    file: TensorFile, tree: Mapping[str, Any], expected: str, keep: dict[str, Tensor] | None = None
) -> None:
    """Read every tensor once, and make sure that nothing was altered; one thread reads, another digests.

    Args:
        file: open.
        tree: the header without the digest.
        expected: the digest.
        keep: gets the tensors, where they are wanted.

    Raises:
        ArtifactError: something was.
    """
    digest = Digest()
    with ThreadPoolExecutor(1) as pool:
        for name in sorted(file.places):
            place = file.places[name]
            pool.submit(digest.begin, name, place.dtype, place.shape)
            if keep is not None:
                keep[name] = file.tensor(name)
                pool.submit(digest.add_tensor, keep[name])
            else:
                before: list[Future[None]] = []
                for chunk in file.chunks(name):  # whose memory is used again
                    for done in before:
                        done.result()
                    before = [pool.submit(digest.add, chunk)]
    if expected != _digest(tree, digest.hex()):
        raise ArtifactError(f"{file.path}: altered after it was written (SHA-256 differs).", hint="Make it again.")


def _digest(tree: Mapping[str, Any], tensors_sha256: str) -> str:
    return hashlib.sha256(f"{json.dumps(tree, sort_keys=True)}{tensors_sha256}".encode()).hexdigest()
