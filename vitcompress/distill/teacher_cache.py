"""What did the teacher say of each view?  Kept on disk, so that the next run on the same views need not ask again.

    DIR/
      cache.json    what it is of: teacher, images, views; a run of anything else is refused
      logits.f32    float32 [steps × batch, K], zero till it is filled
      known.u8      bool [steps × batch]

Each training view is drawn from the seed and its number, so a run of the same seed sees the same views again: sweeps of
learning rates, other plans for the same model. Only logits are kept; other losses look inside the teacher.
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

from vitcompress.data.loaders import Share
from vitcompress.distill.checkpoints import differences
from vitcompress.errors import RecipeError

_FACTS, _LOGITS, _KNOWN = "cache.json", "logits.f32", "known.u8"


class TeacherCache:
    """The teacher's logits of every view of a training run.

    Args:
        folder: where they are; made where it is not there.
        facts: what the logits depend on.
        num_steps: of the run; a longer one than the first finds no logits for its last steps, and adds them.
        batch_size: images per step, of all processes.
        num_classes: K.
        share: this process's part of each step.

    Raises:
        RecipeError: the folder holds something else, or the logits of another teacher or of other views.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], *, num_steps: int, batch_size: int, num_classes: int, share: Share
    ) -> None:
        self.batch_size, self.share = batch_size, share
        rows = num_steps * batch_size
        self._check(folder, {**json.loads(json.dumps(facts)), "classes": num_classes, "--batch-size": batch_size})
        self.logits = _grown(folder / _LOGITS, np.float32, rows, num_classes)
        self.known = _grown(folder / _KNOWN, np.bool_, rows, 1)

    def _check(self, folder: Path, facts: Mapping[str, Any]) -> None:
        path = folder / _FACTS
        try:
            if path.exists():
                held = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(held, dict):
                    raise ValueError(f"{_FACTS} does not say what it is of")
                lines = differences(held, facts)
                if lines:
                    raise RecipeError(
                        "\n".join((f"--cache-teacher {folder} holds what a teacher said in another case:", *lines)),
                        hint="Name another folder, or ask for the same.",
                    )
                return
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise RecipeError(f"--cache-teacher {folder} holds something else.", hint="Name an empty folder.")
            folder.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps(facts), encoding="utf-8")
            os.replace(beside, path)
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(f"--cache-teacher {folder} cannot be used: {error}.") from error

    def rows(self, step: int, part: int) -> np.ndarray[Any, Any]:
        """Numbers of the views in this process's `part` of a step."""
        first = step * self.batch_size
        return np.array(list(self.share.cut(range(first, first + self.batch_size)))[part])

    def get(self, step: int, part: int, ask: Callable[[], Tensor]) -> Tensor:
        """The teacher's logits `[B, K]` of a part of a step.

        Args:
            step: from 0.
            part: from 0.
            ask: runs the teacher.
        """
        rows = self.rows(step, part)
        if self.known[rows].all():
            return torch.from_numpy(self.logits[rows])
        found = ask()
        self.logits[rows] = found.float().cpu().numpy()
        self.known[rows] = True  # after the logits, so that what is known is there
        return found


def _grown(path: Path, kind: type, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """A table on disk of at least `rows` rows, zero where nothing was written; all its room is taken at once."""
    wanted = rows * columns * np.dtype(kind).itemsize
    try:
        with open(path, "ab") as file:
            if file.tell() < wanted:
                _reserve(file, wanted)
                file.truncate(wanted)
        shape = (rows, columns) if columns > 1 else (rows,)
        table: np.ndarray[Any, Any] = np.memmap(path, dtype=kind, mode="r+", shape=shape)
    except OSError as error:
        raise RecipeError(f"--cache-teacher: {path} cannot be written: {error.strerror}.") from error
    return table


def _reserve(file: IO[bytes], size: int) -> None:
    """Take room on the disk: a mapped file of holes ends the process with a signal where the disk is full later.

    Raises:
        OSError: there is not as much; the file is as it was.
    """
    before = file.tell()
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.truncate(before)
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):  # else the disk knows no such thing
            raise
