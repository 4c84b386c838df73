"""What is in the file?  One .safetensors: each shared tensor once, under its donor's name, and JSON in the header.

    {"vitcompress": {format_version, source, plan, data_config, recipe, report, versions, classes, lineage, sha256}}

The digest covers the rest of the JSON and every tensor, so an altered file is known for one. Loading runs the same
`apply_plan` that compression ran, on an empty model, then fills the tensors in: no code, no network, no teacher.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
from vitcompress.source import Source, empty_model, sha256_of
from vitcompress.surgery import apply_plan

FORMAT_VERSION = 1


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


def donor_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without aliases: each shared parameter once, under its donor's name."""
    every = dict(model.named_parameters(remove_duplicate=False))
    aliases = every.keys() - dict(model.named_parameters()).keys()
    return {name: t for name, t in model.state_dict().items() if name not in aliases}


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


def write(path: Path, student: nn.Module, manifest: Manifest, probe: Tensor) -> None:
    """Write `student` to `path`, and make sure that what was written is the student.

    The file is loaded afresh before it takes its place; on a mismatch the old file stays.

    Args:
        path: the target; its folder exists.
        student: on any device, in eval mode.
        manifest: what goes into the header.
        probe: images `[B, C, H, W]` to compare the logits on.

    Raises:
        ArtifactError: the folder cannot be written to, or the file does not give the student back.
    """
    tree = {"format_version": FORMAT_VERSION, **_to_json(manifest)}
    tensors = {name: t.cpu().contiguous() for name, t in donor_tensors(student).items()}
    with replacing(path) as beside:
        try:
            text = json.dumps({**tree, "sha256": _digest(tree, tensors)}, sort_keys=True)
            save_file(tensors, beside, metadata={"vitcompress": text})  # one key: safetensors keeps no order of keys
        except SafetensorError as error:
            raise ArtifactError(f"{path}: cannot be written: {error}.") from error
        verify(load(beside), student, probe)


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


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Load a compressed model: an `nn.Module` in eval mode on CPU, its parameters truly shared.

    Needs no network, no teacher and no further argument. `pretrained_cfg` of the model is timm's data config.

    Args:
        path: a file that `vitcompress compress` wrote.

    Raises:
        ArtifactError: missing, cut short, altered, of a newer format, or not an artifact.
    """
    path = Path(path)
    with _opened(path) as file:
        manifest, tensors = _checked(path, file)  # before anything is built from what the header says
        model = empty_student(path, manifest)
        expected = {name: (t.dtype, tuple(t.shape)) for name, t in donor_tensors(model).items()}
        stored = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        wrong = [name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name)]
        if wrong:
            raise ArtifactError(f"{path}: tensors that are not those of its plan: {shorten(sorted(wrong))}.")
        fill(model, tensors)
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


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` in the place of the model's parameters and buffers, in place, sharing as they are shared.

    Buffers that no state dict holds (position indices, shift masks) are computed anew, as timm does it.

    Args:
        model: parameters and buffers may be on the meta device.
        tensors: by donor's names.

    Raises:
        ArtifactError: a buffer is left without values.
    """
    new: dict[int, nn.Parameter] = {
        id(p): nn.Parameter(tensors[name], requires_grad=p.requires_grad) for name, p in model.named_parameters()
    }
    for prefix, module in model.named_modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                module._parameters[leaf] = new[id(p)]
        for leaf in module._buffers:
            name = f"{prefix}.{leaf}" if prefix else leaf
            if name in tensors:
                module._buffers[leaf] = tensors[name]
    _compute_buffers(model)


def _compute_buffers(model: nn.Module) -> None:
    """Give values to the buffers that are still on the meta device, in place."""
    for module in model.modules():
        empty = {leaf: t for leaf, t in module._buffers.items() if t is not None and t.is_meta}
        module._buffers.update({leaf: torch.empty_like(t, device="cpu") for leaf, t in empty.items()})
        if empty and not hasattr(module, "init_non_persistent_buffers"):
            raise ArtifactError(
                f"{type(module).__name__} cannot compute its buffers {shorten(empty)}.", hint="A newer timm may."
            )
        if empty:
            module.init_non_persistent_buffers()  # type: ignore[operator]


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
        if tree["format_version"] != FORMAT_VERSION:
            raise ArtifactError(
                f"{path} is of format {tree['format_version']}; this vitcompress reads format {FORMAT_VERSION}.",
                hint="pip install --upgrade vitcompress",
            )
        if tree.pop("sha256", None) != _digest(tree, tensors):
            raise ArtifactError(f"{path}: altered after it was written (SHA-256 differs).", hint="Make it again.")
        del tree["format_version"]
        for name in ("classes", "lineage"):  # files from before these fields have neither
            tree[name] = tuple(tree.get(name, ()))
        return Manifest(plan=TypeAdapter(Plan).validate_python(tree.pop("plan")), **tree), tensors
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: its header cannot be understood: {str(error).splitlines()[0]}.") from error


def _to_json(manifest: Manifest) -> dict[str, Any]:
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    return {**fields, "plan": TypeAdapter(Plan).dump_python(manifest.plan, mode="json")}


def _digest(tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{json.dumps(tree, sort_keys=True)}{sha256_of(tensors)}".encode()).hexdigest()
