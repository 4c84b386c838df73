"""What is in the file?  One .safetensors: each shared tensor once, under its donor's name, and JSON in the header.

    {"vitcompress": {format_version, source, plan, data_config, recipe, report, versions, classes, lineage, store,
                     sha256}}

The digest covers the rest of the JSON and every tensor, so an altered file is known for one. Loading runs the same
`apply_plan` that compression ran, on an empty model, then fills the tensors in: no code, no network, no teacher.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitcompress.errors import ArtifactError, VitcompressError, shorten
from vitcompress.plan import Plan
from vitcompress.quantize import STORES, num_bytes
from vitcompress.source import Source, empty_model, sha256_of
from vitcompress.stored import fill, layout, stored_tensors
from vitcompress.surgery import apply_plan

FORMAT_VERSION = 2  # 1, which is still read, has no store: every tensor is as the model holds it


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        source: the teacher's name and the student's architecture and arguments.
        source_sha256: digest of the teacher's tensors; empty where the student has another head or image size since.
        plan: what is shared and added.
        data_config: timm's data config of the student.
        recipe: the resolved recipe.
        report: the report, as `Report` writes it.
        versions: of the packages that made it.
        classes: names of the classes, in order; empty where they are not known.
        lineage: the files it was made from, oldest first, each with its `name`, `sha256` and `command`.
        store: how the tensors are held, a key of `STORES`.
    """

    source: Mapping[str, Any]
    source_sha256: str
    plan: Plan
    data_config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    versions: Mapping[str, str]
    classes: tuple[str, ...] = ()
    lineage: tuple[Mapping[str, str], ...] = ()
    store: str = "source"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write beside `path`, then move over it: a whole new file or the old one, never a part.

    Yields:
        Where to write; removed if the block fails.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot write there: {error.strerror}.") from error
    beside = Path(name)
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # mkstemp's own mode keeps everybody else out
        os.replace(beside, path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)


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
    tree = {"format_version": FORMAT_VERSION, **_to_json(manifest)}
    stored = stored_tensors(student, manifest.store) if stored is None else stored
    tensors = {name: t.detach().cpu().contiguous() for name, t in stored.items()}
    with replacing(path) as beside:
        try:
            text = json.dumps({**tree, "sha256": _digest(tree, tensors)}, sort_keys=True)
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
    tree = {"format_version": FORMAT_VERSION, **_to_json(manifest), "sha256": "0" * 64}
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
        student: on any device, in eval mode.
        probe: images `[B, C, H, W]`.

    Raises:
        ArtifactError: they do not, to the last bit on CPU, within 1e-3 of the largest logit elsewhere.
    """
    device = next(student.parameters()).device
    with torch.inference_mode():
        expected, found = student(probe.to(device)).cpu(), loaded(probe.cpu())
    if not bool(torch.isfinite(expected).all()):
        raise ArtifactError("The student's logits are not finite: nothing was written.")
    worst = float((expected - found).abs().max())
    limit = 0.0 if device.type == "cpu" else 1e-3 * float(expected.abs().max())
    if not worst <= limit:
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
    with _opened(path) as file:
        manifest, tensors = _checked(path, file)  # before anything is built from what the header says
        model = empty_student(path, manifest)
        wrong = _misfits(model, tensors, manifest.store)
        if wrong:
            raise ArtifactError(f"{path}: tensors that are not those of its plan: {shorten(wrong)}.")
        fill(model, tensors, manifest.store, quantized=keep_quantized)
    model.pretrained_cfg = _pretrained_cfg(model, manifest)  # type: ignore[assignment]
    return model.eval()


def empty_student(path: Path, manifest: Manifest) -> nn.Module:
    """The model that a manifest describes, without its weights.

    Args:
        path: of the artifact, for messages.
        manifest: that was read from it.

    Raises:
        ArtifactError: its plan does not fit its model.
    """
    try:
        model = empty_model(Source(**manifest.source))
        apply_plan(model, manifest.plan)
    except (VitcompressError, AttributeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: its plan does not fit its model: {error}") from error
    return model


def _misfits(model: nn.Module, tensors: Mapping[str, Tensor], store: str) -> list[str]:
    """Names of tensors that are missing, that nothing asks for, or of another type or shape, in order."""
    expected = layout(model, store)
    fits = {
        name
        for name, (dtypes, shape) in expected.items()
        if name in tensors and tensors[name].dtype in dtypes and tuple(tensors[name].shape) == shape
    }
    return sorted((expected.keys() | tensors.keys()) - fits)


def _pretrained_cfg(model: nn.Module, manifest: Manifest) -> dict[str, Any]:
    """The data config of the student, as timm keeps it, with its classes and no place to fetch the teacher from."""
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest.data_config.items()}
    labels = {k: v for k, v in manifest.source["pretrained_cfg"].items() if k.startswith("label_")}
    if manifest.classes:
        labels["label_names"] = manifest.classes
    return {"architecture": manifest.source["architecture"], "num_classes": model.num_classes, **labels, **config}


def read_manifest(path: Path) -> Manifest:
    """Read what an artifact says of itself, after making sure that it is whole.

    Raises:
        ArtifactError: missing, cut short, altered, of a newer format, or not an artifact.
    """
    with _opened(path) as file:
        return _checked(path, file)[0]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; whatever it says is wrong with it becomes an `ArtifactError`."""
    if not path.is_file():
        raise ArtifactError(f"{path} {'is not a file' if path.exists() else 'does not exist'}.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", hint="It may be cut short: fetch it again.") from error


def _checked(path: Path, file: Any) -> tuple[Manifest, dict[str, Tensor]]:
    """Manifest and tensors of a file, once it is known that neither was altered."""
    metadata = file.metadata() or {}
    if "vitcompress" not in metadata:
        raise ArtifactError(f"{path} is a safetensors file, but none that vitcompress wrote.")
    # copies: tensors lie in the file at any multiple of four bytes, and kernels round differently off their alignment
    tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    try:
        tree = json.loads(metadata["vitcompress"])
        if tree["format_version"] not in range(1, FORMAT_VERSION + 1):
            raise ArtifactError(
                f"{path} is of format {tree['format_version']}; this vitcompress reads formats 1 to {FORMAT_VERSION}.",
                hint="pip install --upgrade vitcompress",
            )
        if tree.pop("sha256", None) != _digest(tree, tensors):
            raise ArtifactError(f"{path}: altered after it was written (SHA-256 differs).", hint="Make it again.")
        del tree["format_version"]
        for name in ("classes", "lineage"):  # files from before these fields have neither
            tree[name] = tuple(tree.get(name, ()))
        if tree.get("store", "source") not in STORES:
            raise ValueError(f"no store is called {tree['store']}")
        return Manifest(plan=TypeAdapter(Plan).validate_python(tree.pop("plan")), **tree), tensors
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: its header cannot be understood: {str(error).splitlines()[0]}.") from error


def _to_json(manifest: Manifest) -> dict[str, Any]:
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    return {**fields, "plan": TypeAdapter(Plan).dump_python(manifest.plan, mode="json")}


def _digest(tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{json.dumps(tree, sort_keys=True)}{sha256_of(tensors)}".encode()).hexdigest()
