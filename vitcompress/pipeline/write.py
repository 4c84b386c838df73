"""Write a student: round it to its store, then write the artifact and the reports beside it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.artifact.atomic import write_text
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.write import write
from vitcompress.families.outputs import CLASSES, FEATURES, OutputKind
from vitcompress.plans.model import Plan
from vitcompress.pretrained.resolve import Source
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import Report, to_json
from vitcompress.report.picture import to_svg
from vitcompress.runtime.console import Reporter

PROBE_IMAGES = 8


def write_result(
    out: Path, student: nn.Module, tensors: Mapping[str, Tensor], manifest: Manifest, report: Report, reporter: Reporter
) -> None:  # fmt: skip
    """Write a verified artifact, and beside it its two reports and their picture, if there is one.

    Args:
        out: path of the artifact.
        student: in eval mode, rounded to `tensors`.
        tensors: the student as the file holds it.
        manifest: the file's header; holds `report`.
        report: the report.
        reporter: shows what was written.
    """
    # noise: any images do to compare outputs
    size = manifest.data_config["input_size"]
    probe = torch.randn(PROBE_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    write(out, student, manifest, probe, stored=tensors)
    write_text(out.with_name(f"{out.stem}.report.json"), json.dumps(to_json(report), indent=2) + "\n")
    picture, svg = picture_of(out), to_svg(report)
    if svg is not None:
        write_text(picture, svg)
    else:  # an older picture would show other numbers
        picture.unlink(missing_ok=True)
    write_text(out.with_name(f"{out.stem}.report.md"), to_markdown(report, picture=picture.name if svg else None))
    reporter.say(f"wrote {out} ({out.stat().st_size:,} bytes), verified")


def picture_of(out: Path) -> Path:
    """Return the path of the picture beside an artifact."""
    return out.with_name(f"{out.stem}.report.svg")


def notes_on(plan: Plan) -> tuple[str, ...]:
    """Return the notes that every report of a plan carries."""
    size, notes = plan.size, []
    shares = any(len(group.blocks) > 1 for group in plan.groups)
    if shares and (size.teacher_macs is None or size.student_macs is None or size.student_macs >= size.teacher_macs):
        notes.append("Sharing makes a model smaller, not faster: every block is still computed.")
    for transform, name in (("heads", "Head mixing reads"), ("rpe", "The position term on keys reads")):
        if transform in plan.transforms:
            notes.append(
                f"{name} the attention maps, so fused attention cannot be used. With --transforms mlp, it can."
            )
    return tuple(notes)


def described(source: Source, kind: OutputKind) -> dict[str, Any]:
    """Return what an artifact records of its source; places of weights are left out.

    Args:
        source: the source, with the student's head.
        kind: kind of the student's outputs; classes and features go without saying, so that
            versions that know no other kinds read the file.
    """
    places = ("file", "source", "url", "hf_hub_id")
    return {
        "name": source.name,
        "architecture": source.architecture,
        "model_args": source.model_args,
        "pretrained_cfg": {key: value for key, value in source.pretrained_cfg.items() if key not in places},
        **({} if kind in (CLASSES, FEATURES) else {"outputs": kind.name}),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    numbers = {"python": platform.python_version()}
    for name in ("vitcompress", "torch", "timm", "accelerate", "safetensors"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:  # a checkout on the path, not installed
            numbers[name] = "unknown"
    return numbers
