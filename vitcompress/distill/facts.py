"""Describe what determines the result of a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from vitcompress.data.sets import ImageSet
from vitcompress.data.streams import StreamReader

_WITHOUT_EFFECT = {  # fields that do not change the weights, by stage; None for all
    "run": ("resume", "save_every", "log_with", "num_processes", "device"),
    "data": ("num_workers",),
    "gates": None,
    "target": ("options", "max_memory"),
    "model": ("checkpoint", "checkpoint_key"),  # its weights are compared instead
    "teacher": ("teacher_checkpoint", "teacher_checkpoint_key", "allow_weak_teacher"),
}


def run_facts(recipe: Mapping[str, Any], images: ImageSet | None, **more: Any) -> dict[str, Any]:
    """Return everything that determines the resulting weights, to recognize a resumed run.

    Args:
        recipe: as a tree, stage → field → value.
        images: training images; None without any.
        **more: digests of weights, versions, counts.
    """
    tree = {}
    for stage, fields in recipe.items():
        ignored = _WITHOUT_EFFECT.get(stage, ())
        if ignored is not None:
            tree[stage] = {name: value for name, value in fields.items() if name not in ignored}
    return {"recipe": tree, "training images": images_digest(images) if images else None, **more}


def images_digest(images: ImageSet) -> str:
    """Return a digest of the images' names and labels, in order, independent of their folder."""
    if isinstance(images.reader, StreamReader):
        return f"a stream of {len(images.reader.urls)} shards, {_sha(images.reader.urls)}"
    names = [images.reader.where(index) for index in images.indices]
    prefix = os.path.dirname(names[0]) if len(names) == 1 else os.path.commonprefix(names)  # noqa: RUF071 (names, not folders)
    labels = [images.labels[index] for index in images.indices] if images.labels is not None else None
    return f"{len(names):,} images, {_sha([[name[len(prefix) :] for name in names], labels, images.classes])}"


def _sha(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]
