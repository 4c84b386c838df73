"""The options of a teacher with their costs, and the choices between them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vitcompress.search.allocate import Choice, frontier, undominated
from vitcompress.search.options import PARTS, Option, Shapes

MIN_NATS = 1e-9


@dataclass(frozen=True)
class MeasuredOptions:
    """A teacher and the costs of its options.

    Attributes:
        shapes: the teacher's blocks.
        options: all options, measured.
        joint: what a plan costs, as a multiple of the sum of its options' costs.
        num_left_out: number of options that were not measured, as memory was short.
    """

    shapes: Shapes
    options: Sequence[Option]
    joint: float = 1.0
    num_left_out: int = 0
    _choices: dict[tuple[str, ...], list[Choice]] = field(default_factory=dict, compare=False, repr=False)

    def choices(self, kinds: Sequence[str]) -> list[Choice]:
        """Return every choice worth having; cached, as a search asks again for each budget.

        The key of a choice is a tuple of options, whose groups merge into one.

        Args:
            kinds: of options to choose from.
        """
        key = tuple(kinds)
        if key not in self._choices:
            runs: dict[tuple[str, ...], dict[str, list[Option]]] = defaultdict(dict)
            for (blocks, scale), options in self._slots(kinds).items():
                runs[blocks][scale] = options
            self._choices[key] = [
                choice
                for blocks in dict.fromkeys([*((block,) for block in self.shapes.blocks), *runs])
                for choice in _choices_of(self.shapes, blocks, runs[blocks])
            ]
        return self._choices[key]

    def _slots(self, kinds: Sequence[str]) -> dict[tuple[tuple[str, ...], str], list[Option]]:
        """Options by blocks and scale, smallest first; what keeps more costs less."""
        slots: dict[tuple[tuple[str, ...], str], list[Option]] = defaultdict(list)
        for option in sorted(self.options, key=lambda option: option.dial):
            if option.kind in kinds:
                slots[option.group.blocks, option.scale].append(option)
        for slot, options in slots.items():
            # noise in the measurement sometimes says that it costs more
            nats = np.minimum.accumulate([max(option.nats, MIN_NATS) for option in options])
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
