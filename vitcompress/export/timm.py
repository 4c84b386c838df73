"""Export to plain timm weights at full size: blocks written out, factors multiplied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file, save_file
from timm.models import split_model_name_tag
from torch import Tensor

from vitcompress.errors import VitcompressError
from vitcompress.export.format import SLACK, Format, Written
from vitcompress.export.loaded import LoadedArtifact
from vitcompress.families.widths import Widths
from vitcompress.layers.factored import FactoredLinear
from vitcompress.quantize.codecs import num_bytes

HEADER_BYTES = 200  # per tensor of a safetensors file
_CONFIG_ARGUMENTS = ("num_classes", "in_chans", "global_pool")  # timm reads these from a config, too


def check(artifact: LoadedArtifact) -> None:
    """Check that plain timm can hold everything in the model.

    Raises:
        VitcompressError: it cannot; all reasons at once.
    """
    plan = artifact.manifest.plan
    reasons = []
    if plan.transforms:
        reasons.append(f"its blocks have transformations ({', '.join(plan.transforms)})")
    if any(group.widths != Widths() for group in plan.groups):
        reasons.append("the heads and MLPs of its blocks are narrower than timm builds them")
    if any(group.skipped for group in plan.groups):
        reasons.append("the attention or MLP of some blocks is left out")
    if artifact.manifest.source["model_args"].get("norm_eps") is not None:
        reasons.append("its norms have another epsilon than timm's constructor gives them")
    if reasons:
        raise VitcompressError(
            f"{artifact.path} cannot become a plain timm model: {'; '.join(reasons)}.",
            hint="--to hf, pt2 and onnx can hold it; or compress with --transforms none.",
        )


def write(artifact: LoadedArtifact, path: Path) -> Written:
    """Write a state dict with timm's names, and load it strictly into plain timm.

    Args:
        artifact: the artifact.
        path: path of the .safetensors file.
    """
    name, arguments = timm_call(artifact)
    plain = timm.create_model(name, **arguments)
    weights = plain_weights(artifact, list(plain.state_dict()))
    save_file(weights, path, metadata={"format": "pt", "data_config": artifact.data_config_json})
    plain.load_state_dict(load_file(path))
    plain.eval()

    keywords = "".join(f", {key}={value!r}" for key, value in arguments.items())
    notes = (
        "Full size: plain timm has no shared or factored layers.",
        f"timm.create_model({name!r}, checkpoint_path=FILE{keywords})",
    )
    tensor_bytes = num_bytes(weights)
    return Written(plain, tensor_bytes, int(SLACK * tensor_bytes) + HEADER_BYTES * len(weights), notes)


def timm_call(artifact: LoadedArtifact) -> tuple[str, dict[str, Any]]:
    """Return the name and arguments with which timm builds the artifact's source."""
    source = artifact.manifest.source
    config = source["pretrained_cfg"]
    configured = {key: config[key] for key in _CONFIG_ARGUMENTS if config.get(key) is not None}
    classes = {"num_classes": artifact.student.num_classes}
    return split_model_name_tag(source["architecture"])[0], {**configured, **classes, **source["model_args"]}


def plain_weights(artifact: LoadedArtifact, names: list[str]) -> dict[str, Tensor]:
    """Return the tensors of the model without shared or factored layers, each in its own memory.

    Args:
        artifact: the artifact.
        names: names in timm's state dict.
    """
    factored = {
        f"{path}.weight": layer.weight
        for path, layer in artifact.student.named_modules()
        if isinstance(layer, FactoredLinear)
    }
    tensors = {**artifact.student.state_dict(), **factored}
    return {name: tensors[name].detach().clone() for name in names}


TIMM = Format(write=write, suffix=".safetensors", check=check)
