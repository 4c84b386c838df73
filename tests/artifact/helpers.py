"""Artifacts for tests: write them, and damage them."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.factories import ARGS, VARIANTS, compressed, images, tiny
from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.write import write
from vitcompress.plans.model import Plan
from vitcompress.pretrained.data_config import data_config
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.recipe import ModelRecipe


def manifest_of(teacher: nn.Module, plan: Plan, variant: str, **model_args: Any) -> Manifest:
    name, args = VARIANTS[variant]
    return Manifest(
        source={"name": name, "architecture": name, "model_args": {**ARGS, **args, **model_args}, "pretrained_cfg": {}},
        source_sha256=sha256_of(teacher.state_dict()),
        plan=plan,
        data_config=data_config(teacher, ModelRecipe(name)),
        recipe={},
        report={"schema_version": 1},
        versions={},
    )


def write_student(path: Path, variant: str = "vit", *, depth: int = 4, **recipe: Any) -> tuple[nn.Module, Plan]:
    """Write a student to `path`, all of its parameters moved away from the teacher's."""
    teacher = tiny(variant, depth=depth)
    student, plan = compressed(teacher, **recipe)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    write(path, student, manifest_of(teacher, plan, variant, depth=depth), images(student))
    return student, plan


def write_stored(path: Path, student: nn.Module, plan: Plan, variant: str, store: str) -> None:
    """Round `student` to a store, in place, and write it."""
    stored = stored_tensors(student, store)
    round_to(student, stored, store)
    manifest = dataclasses.replace(manifest_of(tiny(variant), plan, variant), store=store)
    write(path, student, manifest, images(student), stored=stored)


def flip(position: Callable[[bytes], int], mask: int = 1) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = position(data)
        return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]

    return change


HARM: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "seven-bytes": lambda data: data[:7],
    "cut-in-header": lambda data: data[:100],
    "cut-by-half": lambda data: data[: len(data) // 2],
    "cut-by-one": lambda data: data[:-1],
    "one-byte-more": lambda data: data + b"\0",
    "not-safetensors": lambda data: b"PK\x03\x04 something else entirely",
    "bit-in-first-tensor": flip(lambda data: 8 + struct.unpack("<Q", data[:8])[0]),
    "sign-of-last-weight": flip(lambda data: len(data) - 1, 0x80),
    "sharing-edited": lambda data: data.replace(b'\\"token_kernel\\": 3', b'\\"token_kernel\\": 5'),
    "kernel-below-zero": lambda data: data.replace(b'\\"token_kernel\\": 3', b'\\"token_kernel\\":-3'),
    "heads-of-another-type": lambda data: data.replace(b'\\"num_heads\\": 3', b'\\"num_heads\\":[]'),
    "block-that-is-not-there": lambda data: data.replace(b'\\"blocks.3\\"', b'\\"blocks.9\\"'),
    "unknown-family": lambda data: data.replace(b'\\"family\\": \\"vit\\"', b'\\"family\\": \\"wit\\"'),
    "report-edited": lambda data: data.replace(b'\\"params_ratio\\": 1', b'\\"params_ratio\\": 9'),
    "other-model": lambda data: data.replace(b'\\"depth\\": 4', b'\\"depth\\": 5'),
    "no-json": lambda data: data.replace(b'\\"format_version\\"', b'\\"format_version\\ '),
    "no-digest": lambda data: data.replace(b'\\"sha256\\"', b'\\"sha255\\"'),
    "format-of-the-future": lambda data: data.replace(b'\\"format_version\\": 2', b'\\"format_version\\": 3'),
}
