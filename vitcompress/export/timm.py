"""How does an artifact become plain timm weights?  Every block written out, factors multiplied: full size again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import split_model_name_tag
from torch import Tensor

from vitcompress.errors import VitcompressError
from vitcompress.export.formats import SLACK, Format, Written
from vitcompress.export.subject import Subject
from vitcompress.families.widths import Widths
from vitcompress.layers.factored import FactoredLinear
from vitcompress.quantize.codecs import num_bytes

HEADER_BYTES = 200  # per tensor, of a safetensors file
_FROM_CFG = ("num_classes", "in_chans", "global_pool")  # what timm takes from a config where no argument says it


def check(subject: Subject) -> None:
    """Make sure that plain timm has a place for everything in the model.

    Raises:
        VitcompressError: it has not.
    """
    plan = subject.manifest.plan
    faults = []
    if plan.transforms:
        faults.append(f"its blocks have transformations of their own ({', '.join(plan.transforms)})")
    if any(group.widths != Widths() for group in plan.groups):
        faults.append("its blocks are narrower than timm builds them, heads and MLPs of other widths")
    if subject.manifest.source["model_args"].get("norm_eps") is not None:
        faults.append("its norms have another epsilon than timm's constructor gives them")
    if faults:
        raise VitcompressError(
            f"{subject.path} cannot be a plain timm model: {'; '.join(faults)}.",
            hint="--to hf, pt2 and onnx can hold it; or compress with --transforms none.",
        )


def write(subject: Subject, path: Path) -> Written:
    """Write a state dict in timm's names, and load it strictly into plain timm.

    Args:
        subject: the artifact.
        path: the .safetensors file to write.
    """
    name, arguments = timm_call(subject)
    plain = timm.create_model(name, **arguments)
    weights = plain_weights(subject, list(plain.state_dict()))
    save_file(weights, path, metadata={"format": "pt"})
    plain.load_state_dict(load_file(path))
    plain.eval()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            outputs: Tensor = plain(images)
        return outputs

    words = "".join(f", {key}={value!r}" for key, value in arguments.items())
    notes = (
        "Full size: plain timm has no shared or factored layers.",
        f"timm.create_model({name!r}, checkpoint_path=FILE{words})",
    )
    tensor_bytes = num_bytes(weights)
    return Written(run, tensor_bytes, int(SLACK * tensor_bytes) + HEADER_BYTES * len(weights), notes)


def timm_call(subject: Subject) -> tuple[str, dict[str, Any]]:
    """The name and the arguments by which timm builds the model that the artifact was made from."""
    source = subject.manifest.source
    cfg = {key: source["pretrained_cfg"][key] for key in _FROM_CFG if source["pretrained_cfg"].get(key) is not None}
    classes = {"num_classes": subject.student.num_classes}
    return split_model_name_tag(source["architecture"])[0], {**cfg, **classes, **source["model_args"]}


def plain_weights(subject: Subject, names: list[str]) -> dict[str, Tensor]:
    """The tensors of a model without shared or factored layers, each in memory of its own.

    Args:
        subject: the artifact.
        names: of timm's state dict.
    """
    own = subject.student.state_dict()
    factored = {
        f"{path}.weight": layer.weight
        for path, layer in subject.student.named_modules()
        if isinstance(layer, FactoredLinear)
    }
    return {name: (factored[name] if name in factored else own[name]).detach().clone() for name in names}


TIMM = Format(write=write, suffix=".safetensors", check=check)
