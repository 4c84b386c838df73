"""What is written of a student?  Its tensors as they are stored, the artifact, and its reports beside it."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.artifact import file as artifact
from vitcompress.plans.make import weighed
from vitcompress.plans.model import Plan
from vitcompress.pretrained.source import Source
from vitcompress.quantize.codecs import num_bytes
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import SCHEMA_VERSION, Report, to_json
from vitcompress.report.picture import to_svg
from vitcompress.runtime.console import Reporter

PROBE_IMAGES = 8


@dataclass(frozen=True)
class Stored:
    """A student as its file holds it.

    Attributes:
        tensors: what the file holds, by name.
        plan: with the bytes that they take.
        store: how they are held.
    """

    tensors: Mapping[str, Tensor]
    plan: Plan
    store: str

    @classmethod
    def of(cls, student: nn.Module, plan: Plan, store: str) -> Stored:
        """What a file holds of `student`, which is left as it is."""
        tensors = stored_tensors(student, store)
        return cls(tensors, weighed(plan, num_bytes(tensors)), store)

    def round(self, student: nn.Module) -> None:
        """Set the student's parameters to what the file gives back, in place: what is measured is what is stored."""
        round_to(student, self.tensors, self.store)


def report_of(stored: Stored, source: Source, *, notes: tuple[str, ...] = (), **measured: Any) -> Report:
    """What came out, of any command: what the plan says of itself, and what was measured.

    Args:
        stored: the student.
        source: the model that it was made of.
        notes: what the numbers do not say, but for what `notes_on` says of every such plan.
        measured: other fields of `Report`.
    """
    plan = stored.plan
    return Report(
        schema_version=SCHEMA_VERSION,
        model=source.name,
        family=plan.family,
        groups=tuple(len(group.blocks) for group in plan.groups),
        transforms=plan.transforms,
        size=plan.size,
        made_of=plan.groups,
        store=stored.store,
        versions=versions(),
        notes=notes_on(plan) + notes,
        **measured,
    )


def write_result(
    out: Path, student: nn.Module, stored: Stored, manifest: artifact.Manifest, report: Report, reporter: Reporter
) -> None:
    """Write a verified artifact, and beside it its two reports and their picture, where there is one to draw.

    Args:
        out: the artifact.
        student: in eval mode, rounded to `stored`.
        stored: what the artifact holds of it.
        manifest: what the artifact says of itself.
        report: the same as in the manifest.
        reporter: told of it.
    """
    # noise does to compare outputs on, and is always at hand
    size = manifest.data_config["input_size"]
    probe = torch.randn(PROBE_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    artifact.write(out, student, manifest, probe, stored=stored.tensors)
    _write_text(out.with_name(f"{out.stem}.report.json"), json.dumps(to_json(report), indent=2) + "\n")
    picture, svg = picture_of(out), to_svg(report)
    if svg is not None:
        _write_text(picture, svg)
    else:  # an older one would be of other numbers
        picture.unlink(missing_ok=True)
    _write_text(out.with_name(f"{out.stem}.report.md"), to_markdown(report, picture=picture.name if svg else None))
    reporter.say(f"wrote {out} ({out.stat().st_size:,} bytes), verified")


def picture_of(out: Path) -> Path:
    """Where the picture of an artifact's report lies, if it has one."""
    return out.with_name(f"{out.stem}.report.svg")


def _write_text(path: Path, text: str) -> None:
    with artifact.replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def notes_on(plan: Plan) -> tuple[str, ...]:
    """What a reader of any report must know of sharing."""
    size, notes = plan.size, []
    shares = any(len(group.blocks) > 1 for group in plan.groups)
    if shares and (size.teacher_macs is None or size.student_macs is None or size.student_macs >= size.teacher_macs):
        notes.append("Sharing makes a model smaller, not faster: every block is still computed.")
    for transform, name in (("heads", "Head mixing needs"), ("rpe", "The position term on keys needs")):
        if transform in plan.transforms:
            notes.append(f"{name} the attention maps, so it gives up fused attention (--transforms mlp keeps it).")
    return tuple(notes)


def described(source: Source) -> dict[str, Any]:
    """What an artifact says of its source: what it is, not where its weights lay."""
    places = ("file", "source", "url", "hf_hub_id")
    return {
        "name": source.name,
        "architecture": source.architecture,
        "model_args": source.model_args,
        "pretrained_cfg": {key: value for key, value in source.pretrained_cfg.items() if key not in places},
    }


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("vitcompress", "torch", "timm", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout on the path, not installed
            found[name] = "unknown"
    return found


def command_line(arguments: list[str]) -> str:
    """What was typed, as a shell would take it again."""
    return shlex.join(["vitcompress", *arguments])
