"""Load an artifact into a model, checking everything before it is built or read.

Loading applies the file's plan to an empty model with the same `apply_plan` that compression ran,
then fills in the tensors: no code from the file, no network, no teacher. No tensor is read until
all have the names, types and shapes that the plan requires.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from timm.models import is_model, is_model_in_modules, split_model_name_tag
from timm.models._pretrained import PretrainedCfg  # not exported by timm
from torch import Tensor, nn

from vitcompress.artifact.hub import locate
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.read import check_digest, read_header
from vitcompress.artifact.tensorfile import TensorFile, open_tensors
from vitcompress.bundled import FASHION_VIT
from vitcompress.errors import ArtifactError, first_line, shorten
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import model_input_size
from vitcompress.pretrained.resolve import Source
from vitcompress.quantize.codecs import num_bytes
from vitcompress.quantize.store import fill, layout
from vitcompress.surgery import apply_plan

TIMM_MODULES = (  # the modules of timm that have models of our families
    "beit", "deit", "eva", "swin_transformer", "swin_transformer_v2", "vision_transformer", "vision_transformer_hybrid",
    "vitamin",
)  # fmt: skip
_CONFIG_FIELDS = frozenset(field.name for field in dataclasses.fields(PretrainedCfg))
# A model of flexible image size accepts images with up to this many times the numbers of those that
# it was built for.
_MAX_IMAGE_GROWTH = 16
# Tables that no file holds (window masks, rotary positions) grow with the image: at most this much
# beyond the file's size.
_MAX_TABLE_BYTES = 32 << 20


def load(path: str | os.PathLike[str], *, keep_quantized: bool = False) -> nn.Module:
    """Load a compressed model, in eval mode on CPU, with truly shared parameters.

    A file or folder needs no network, no teacher and no other argument. No code from the file is
    run. The model's `pretrained_cfg` is timm's data config.

    Args:
        path: a file that `vitcompress compress` wrote, a folder that `vitcompress export --to hf`
            wrote, or `hf-hub:USER/REPO`.
        keep_quantized: keep int8 and int4 matrices quantized in memory and decode each when its
            layer runs. Outputs are the same and memory is smaller, but the model cannot be trained.
            By default all numbers are floating.

    Returns:
        The model.

    Raises:
        ArtifactError: the file is missing, cut short, altered, of a newer format, or not an
            artifact.
    """
    path = locate(path)
    with open_tensors(path) as file:
        header = read_header(file)
        manifest = header.manifest
        try:
            model = empty_student(path, manifest)
            _check_tensors(model, file, manifest.store)
        except ArtifactError:
            check_digest(file, header)  # damage is the likelier cause, and the clearer message
            raise
        tensors: dict[str, Tensor] = {}
        check_digest(file, header, keep=tensors)
        fill(model, tensors, manifest.store, quantized=keep_quantized)
    model.pretrained_cfg = student_config(model, manifest)  # type: ignore[assignment]
    return model.eval()


def empty_student(path: Path, manifest: Manifest) -> nn.Module:
    """Build the model that a manifest describes, on the meta device.

    Args:
        path: path of the artifact.
        manifest: manifest of that artifact.

    Raises:
        ArtifactError: timm does not know the source, the plan does not fit the model, or the model
            does not take the manifest's images.
    """
    check_known(path, manifest)
    try:
        model = empty_model(Source(**manifest.source))
        with torch.device("meta"):
            apply_plan(model, manifest.plan)
    except Exception as error:  # timm's constructors raise anything for arguments that make no sense
        raise ArtifactError(f"{path}: its plan does not fit its model: {first_line(error)}") from error
    table_bytes = num_bytes({str(id(t)): t for t in model.buffers()})
    if table_bytes > _MAX_TABLE_BYTES + path.stat().st_size:
        raise ArtifactError(f"{path}: its model would compute {table_bytes:,} bytes of tables for its image size.")
    _check_images(path, model, tuple(manifest.data_config["input_size"]))
    return model


def check_known(path: Path, manifest: Manifest) -> None:
    """Check a manifest's source against timm's registry; call this before building a model from it.

    Args:
        path: path of the artifact, for messages.
        manifest: manifest of that artifact.

    Raises:
        ArtifactError: the architecture, the source's name or a field of its config is unknown.
    """
    source = manifest.source
    architecture = split_model_name_tag(source["architecture"])[0]
    if not is_model_in_modules(architecture, TIMM_MODULES):
        raise ArtifactError(f"{path}: {architecture} is not a model of a supported family.")
    # The source is looked up by this name. A name with a colon is a place to download from, and is
    # not followed.
    name = source["name"]
    if ":" not in name and name != FASHION_VIT.name and not is_model(split_model_name_tag(name)[0]):
        raise ArtifactError(f"{path}: its source is not one of timm's models.")
    unknown = sorted(source["pretrained_cfg"].keys() - _CONFIG_FIELDS)
    if unknown:
        raise ArtifactError(f"{path}: timm's pretrained_cfg has no field {unknown[0][:80]!a}.")


def _check_images(path: Path, model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Check that a model takes images of the size that its manifest gives.

    Raises:
        ArtifactError: it does not.
    """
    built = model_input_size(model, input_size)
    any_size = not getattr(getattr(model, "patch_embed", None), "strict_img_size", True)
    fits = any_size and input_size[0] == built[0] and math.prod(input_size) <= _MAX_IMAGE_GROWTH * math.prod(built)
    if input_size != built and not fits:
        raise ArtifactError(f"{path}: its data config has images of {input_size}, but its model takes {built}.")


def _check_tensors(model: nn.Module, file: TensorFile, store: str) -> None:
    """Check that a file's tensors have the names, types and shapes that a model requires.

    Raises:
        ArtifactError: tensors are missing, superfluous, or have another type or shape.
    """
    expected = layout(model, store)
    fits = {
        name
        for name, (dtypes, shape) in expected.items()
        if (place := file.places.get(name)) and place.dtype in map(str, dtypes) and place.shape == shape
    }
    wrong = sorted((expected.keys() | file.places.keys()) - fits)
    if wrong:
        raise ArtifactError(f"{file.path}: tensors do not match its plan: {shorten(wrong)}.")


def student_config(model: nn.Module, manifest: Manifest) -> dict[str, Any]:
    """Return timm's config of the student: with its classes, without a URL of the source.

    Args:
        model: the student, on any device.
        manifest: manifest of its artifact.
    """
    labels = {k: v for k, v in manifest.source["pretrained_cfg"].items() if k.startswith("label_")}
    if manifest.classes:
        labels["label_names"] = manifest.classes
    return {
        "architecture": manifest.source["architecture"],
        "num_classes": model.num_classes,
        **labels,
        **manifest.data_config,
    }
