"""What is kept of each run? A line of JSON, so that an interrupted comparison can continue."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Key(NamedTuple):
    """What a run is known by; `lr`, `seed` and `steps` are 0 where nothing is trained."""

    model: str
    ratio: str
    method: str
    lr: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        model: what is compressed.
        ratio: size aimed at.
        method: name in `METHODS`.
        lr: peak learning rate.
        seed: of order, views and what is random in the start.
        steps: of training.
        batch_size: images per step.
        num_params: of the student.
        num_bytes: of its tensors as they are stored.
        macs: multiply-accumulates of one image.
        start_top1: before training, on the test images, in percent.
        top1: after it; None of a training that was only to choose a learning rate.
        agreement: with the teacher, after it, in percent.
        held_out_top1: after it, on images held out of training.
        held_out_kl: from the teacher there, in nats per image.
        seconds: of training.
        diverged: whether it ended before its time, at the last good weights.
        unfit: why there is no such student; empty where there is one. The numbers mean nothing
            then.
    """

    model: str
    ratio: str
    method: str
    lr: float = 0.0
    seed: int = 0
    steps: int = 0
    batch_size: int = 0
    num_params: int = 0
    num_bytes: int = 0
    macs: int = 0
    start_top1: float = 0.0
    top1: float | None = None
    agreement: float = 0.0
    held_out_top1: float = 0.0
    held_out_kl: float = 0.0
    seconds: float = 0.0
    diverged: bool = False
    unfit: str = ""

    @property
    def key(self) -> Key:
        """What it is known by."""
        return Key(self.model, self.ratio, self.method, self.lr, self.seed, self.steps)

    @property
    def rank(self) -> float:
        """Negative divergence on the held-out images, which may be too few for a reliable top-1."""
        return -self.held_out_kl


class Results:
    """The records of a file.

    Args:
        path: one JSON object per line; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[Key, Record] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                record = Record(**json.loads(line))
            except json.JSONDecodeError:  # the line that an interruption cut short: its run is done again
                continue
            self.records[record.key] = record

    def add(self, record: Record) -> None:
        """Append a record to the file, at once."""
        self.records[record.key] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut else "") + json.dumps(dataclasses.asdict(record)) + "\n")


@dataclass(frozen=True)
class Row:
    """A method at a ratio, over its seeds; percentages.

    Attributes:
        record: of any of the runs, for what all of them have in common.
        start_top1: mean before training.
        top1: after it, by seed.
        agreement: mean after it.
    """

    record: Record
    start_top1: float
    top1: tuple[float, ...]
    agreement: float

    @property
    def mean(self) -> float:
        """Mean top-1 after training."""
        return statistics.mean(self.top1)

    @property
    def spread(self) -> float:
        """Largest minus smallest top-1 after training."""
        return max(self.top1) - min(self.top1)


def summarise(records: Iterable[Record], model: str, steps: int | None = None) -> list[Row]:
    """A row for each ratio and method, in the order in which they came.

    Args:
        records: of any models.
        model: whose rows.
        steps: length of the trainings shown; None for the longest there is.
    """
    mine = [record for record in records if record.model == model and record.top1 is not None]
    shown = steps if steps is not None else max((record.steps for record in mine), default=0)
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in mine:
        if record.steps in (0, shown):
            cells.setdefault((record.ratio, record.method), []).append(record)
    return [_row(best_runs(cell)) for cell in cells.values()]


def best_runs(records: Sequence[Record]) -> list[Record]:
    """Return the runs of the chosen learning rate: most seeds, then best on held-out images."""
    by_lr: dict[float, list[Record]] = {}
    for record in records:
        by_lr.setdefault(record.lr, []).append(record)
    return max(by_lr.values(), key=lambda runs: (len(runs), min(runs, key=lambda run: run.seed).rank))


def _row(runs: Sequence[Record]) -> Row:
    return Row(
        runs[0],
        statistics.mean(run.start_top1 for run in runs),
        tuple(run.top1 for run in runs if run.top1 is not None),
        statistics.mean(run.agreement for run in runs),
    )
