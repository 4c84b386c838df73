"""Cache the teacher's logits on disk, for later runs on the same views.

    DIR/
      cache.json    what the logits depend on: teacher, images, views; must be equal in later runs
      logits.f32    float32 [steps × batch, K], zero until filled
      known.u8      bool [steps × batch], whether a row is filled

Each training view is drawn from the seed and its number, so runs with the same seed see the same
views: sweeps of learning rates, or other plans for the same model. Only logits are cached; other
losses need more of the teacher.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from vitcompress.artifact.atomic import write_text
from vitcompress.data.loaders import ProcessShare
from vitcompress.errors import ArtifactError, RecipeError
from vitcompress.recipe.differences import describe_differences

_FACTS, _LOGITS, _KNOWN = "cache.json", "logits.f32", "known.u8"


class TeacherCache:
    """Cached logits of the teacher, one row per training view.

    Args:
        folder: holds the cache; created if missing.
        facts: what the logits depend on.
        num_steps: length of the run; a run longer than earlier ones adds the missing logits.
        batch_size: images per step, over all processes.
        num_classes: K.
        share: this process's part of each step.

    Raises:
        RecipeError: the folder holds something else, or logits of another teacher or other views.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        *,
        num_steps: int,
        batch_size: int,
        num_classes: int,
        share: ProcessShare,
    ) -> None:
        self.batch_size, self.share = batch_size, share
        rows = num_steps * batch_size
        self._check(folder, {**json.loads(json.dumps(facts)), "classes": num_classes, "--batch-size": batch_size})
        self.logits = _open_table(folder / _LOGITS, np.float32, rows, num_classes)
        self.known = _open_table(folder / _KNOWN, np.bool_, rows, 1)[:, 0]

    def _check(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Check that the folder holds a cache of the same facts, or start one if it is empty."""
        path = folder / _FACTS
        try:
            if path.exists():
                cached = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(cached, dict):
                    raise ValueError(f"{_FACTS} does not describe a cache")
                lines = describe_differences(cached, facts)
                if lines:
                    raise RecipeError(
                        "\n".join((f"--cache-teacher {folder} holds the logits of a different run:", *lines)),
                        hint="Use another folder, or the same options.",
                    )
                return
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise RecipeError(f"--cache-teacher {folder} holds something else.", hint="Use an empty folder.")
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(facts))
        except (OSError, ValueError, RecursionError, ArtifactError) as error:
            raise RecipeError(f"--cache-teacher {folder} cannot be used: {error.__cause__ or error}.") from error

    def rows(self, step: int, part: int) -> np.ndarray[Any, Any]:
        """Return the rows of the views in this process's `part` of a step."""
        first = step * self.batch_size
        return np.array(list(self.share.cut(range(first, first + self.batch_size)))[part])

    def get(self, step: int, part: int, run_teacher: Callable[[], Tensor]) -> Tensor:
        """Return the teacher's logits `[B, K]` for a part of a step, cached or computed.

        Args:
            step: counted from 0.
            part: counted from 0.
            run_teacher: computes the logits.
        """
        rows = self.rows(step, part)
        if self.known[rows].all():
            return torch.from_numpy(self.logits[rows])
        logits = run_teacher()
        self.logits[rows] = logits.float().cpu().numpy()
        self.known[rows] = True  # after the logits, so that a row marked as known is complete
        return logits


def _open_table(path: Path, kind: type, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Map a table on disk with at least `rows` rows, initially zero, and reserve its space."""
    num_bytes = rows * columns * np.dtype(kind).itemsize
    try:
        with open(path, "ab") as file:
            if file.tell() < num_bytes:
                _reserve(file, num_bytes)
                file.truncate(num_bytes)
        table: np.ndarray[Any, Any] = np.memmap(path, dtype=kind, mode="r+", shape=(rows, columns))
    except OSError as error:
        raise RecipeError(f"--cache-teacher: {path} cannot be written: {error.strerror}.") from error
    return table


def _reserve(file: IO[bytes], size: int) -> None:
    """Reserve space on disk: on a full disk, writing to a mapped sparse file kills the process.

    Raises:
        OSError: there is not enough space; the file is unchanged.
    """
    before = file.tell()
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.truncate(before)
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):  # otherwise the file system does not support it
            raise
