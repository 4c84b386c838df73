"""The options of a teacher with their costs, and the choices between them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vitcompress.search.allocate import Choice, frontier, undominated
from vitcompress.search.options import PARTS, Option, Shapes

MIN_NATS = 1e-9


@dataclass(frozen=True)
class Level:
    """What options cost in the context of one student.

    Attributes:
        params: number of parameters of the student.
        nats: cost of each option, nats per image.
        joint: what the student costs, as a multiple of the sum of its options' costs.
    """

    params: int
    nats: Sequence[float]
    joint: float = 1.0


@dataclass(frozen=True)
class MeasuredOptions:
    """A teacher and the costs of its options.

    Attributes:
        shapes: the teacher's blocks.
        options: all options that were measured.
        levels: their costs in contexts; the largest student first.
        num_left_out: number of options that were not measured, as memory was short.
    """

    shapes: Shapes
    options: Sequence[Option]
    levels: Sequence[Level]
    num_left_out: int = 0
    _choices: dict[tuple[Any, ...], list[Choice]] = field(init=False, default_factory=dict, compare=False, repr=False)

    def at(self, params: float) -> list[Option]:
        """Return the options with their costs in a student of some size, nats per image.

        Between two levels, the logarithm of a cost is linear in that of the parameters.

        Args:
            params: number of parameters of the student.
        """
        place = self._place(params)
        costs = np.array([np.maximum(np.array(level.nats) * level.joint, MIN_NATS) for level in self.levels])
        logs = np.log(costs)
        at_place = np.exp([np.interp(place, range(len(logs)), column) for column in logs.T])
        return [replace(option, nats=float(nats)) for option, nats in zip(self.options, at_place, strict=True)]

    def _place(self, params: float) -> float:
        """Where a size lies among the levels: 0 at the first or above it, 1 at the second."""
        sizes = [-math.log(level.params) for level in self.levels]
        return float(np.interp(-math.log(max(params, 1)), sizes, range(len(sizes))))

    def choices(self, kinds: Sequence[str], params: float) -> list[Choice]:
        """Return every choice worth having; cached, as a search asks again and again.

        The key of a choice is a tuple of options, whose groups merge into one.

        Args:
            kinds: of options to choose from.
            params: number of parameters of the student; options cost what they do in one so large.
        """
        key = (*kinds, self._place(params))
        if key not in self._choices:
            runs: dict[tuple[str, ...], dict[str, list[Option]]] = defaultdict(dict)
            for (blocks, scale), options in self._slots(kinds, params).items():
                runs[blocks][scale] = options
            self._choices[key] = [
                choice
                for blocks in dict.fromkeys([*((block,) for block in self.shapes.blocks), *runs])
                for choice in _choices_of(self.shapes, blocks, runs[blocks])
            ]
        return self._choices[key]

    def _slots(self, kinds: Sequence[str], params: float) -> dict[tuple[tuple[str, ...], str], list[Option]]:
        """Options by blocks and scale, smallest first; what keeps more costs less."""
        slots: dict[tuple[tuple[str, ...], str], list[Option]] = defaultdict(list)
        for option in sorted(self.at(params), key=lambda option: option.dial):
            if option.kind in kinds:
                slots[option.group.blocks, option.scale].append(option)
        for slot, options in slots.items():
            # noise in the measurement sometimes says that it costs more
            nats = np.minimum.accumulate([option.nats for option in options])
            nats = nats * np.linspace(1, 1 - 1e-7, len(nats))  # at equal cost, prefer what keeps more
            slots[slot] = [replace(option, nats=float(value)) for option, value in zip(options, nats, strict=True)]
        return slots


def _choices_of(shapes: Shapes, blocks: tuple[str, ...], scales: Mapping[str, Sequence[Option]]) -> list[Choice]:
    """Return the choices for one run of blocks that are worth having."""
    keep = shapes.keep(blocks)
    queries, values = [keep, *scales.get("attn.qk", ())], [keep, *scales.get("attn.v", ())]
    parts: dict[str, list[tuple[Option, ...]]] = {"attn": list(itertools.product(queries, values)), "mlp": [(keep,)]}
    for scale, options in scales.items():
        if scale not in ("attn.qk", "attn.v"):
            parts[scale.partition(".")[0]] += [(option,) for option in options]
    attention, mlp = (
        undominated(parts[part], lambda options: (-sum(o.saved_params for o in options), sum(o.nats for o in options)))
        for part in PARTS
    )
    first, last = shapes.blocks.index(blocks[0]), shapes.blocks.index(blocks[0]) + len(blocks)
    total = shapes.params(blocks)
    return frontier(
        Choice(first, last, total - sum(o.saved_params for o in key), sum(o.nats for o in key), key)
        for key in (a + m for a, m in itertools.product(attention, mlp))
        if len(blocks) == 1 or any(option.kind != "keep" for option in key)
    )
