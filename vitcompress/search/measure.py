"""Measure what every option costs, and list the choices between them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from vitcompress.families.narrow import full_widths
from vitcompress.families.widths import Widths
from vitcompress.search.allocate import Choice, frontier, undominated
from vitcompress.search.options import PARTS, Option, Shapes, run_options, single_options
from vitcompress.search.sensitivity import Sensitivity

MARKS = 24
"""Widths or ranks per scale to choose from; costs are interpolated between those measured."""


@dataclass(frozen=True)
class MeasuredOptions:
    """A teacher and the costs of its options.

    Attributes:
        shapes: the teacher's blocks.
        singles: options of one block, by block and scale.
        runs: options of several consecutive blocks.
    """

    shapes: Shapes
    singles: Mapping[tuple[str, str], Sequence[Option]]
    runs: Sequence[Option]
    _choices: dict[tuple[str, ...], list[Choice]] = field(default_factory=dict, compare=False, repr=False)

    def choices(self, kinds: Sequence[str]) -> list[Choice]:
        """Return every choice worth having; cached, as a search asks again for each budget.

        Args:
            kinds: of options to choose from.
        """
        if tuple(kinds) not in self._choices:
            self._choices[tuple(kinds)] = [*_single_choices(self, kinds), *_run_choices(self, kinds)]
        return self._choices[tuple(kinds)]

    def rows(self) -> Iterator[Option]:
        """Return every option that was measured."""
        return itertools.chain(*self.singles.values(), self.runs)


def measure_options(
    shapes: Shapes, fitted: Tensor, judged: Tensor, tell: Callable[[int, int], None]
) -> MeasuredOptions:
    """Measure what every option costs.

    Args:
        shapes: the teacher, in eval mode, and the kinds of options to measure.
        fitted: images that options are fitted to, `[B, C, H, W]`, on the teacher's device.
        judged: other images, on which costs are measured.
        tell: called after each option with the number of options measured so far and in all.
    """
    by_block = {block: list(single_options(shapes, block)) for block in shapes.blocks}
    runs = list(run_options(shapes))
    sensitivity = Sensitivity(shapes.model, shapes.family, fitted, judged)
    total, count = sum(map(len, by_block.values())) + len(runs), itertools.count(1)

    def measure(option: Option) -> Option:
        measured = replace(option, cost=sensitivity.cost(option.group))
        tell(next(count), total)
        return measured

    singles: dict[tuple[str, str], list[Option]] = defaultdict(list)
    for block, options in by_block.items():
        for scale, option in options:
            singles[block, scale].append(measure(option))
        sensitivity.drop_moments([block])
    measured_runs = []
    for option in runs:
        measured_runs.append(measure(option))
        # runs are in the order of their first blocks
        sensitivity.drop_moments(shapes.blocks[: shapes.blocks.index(option.group.donor)])
    return MeasuredOptions(shapes, singles, measured_runs)


def _single_choices(measured: MeasuredOptions, kinds: Sequence[str]) -> Iterator[Choice]:
    """Yield the choices for each block alone."""
    shapes = measured.shapes
    for number, block in enumerate(shapes.blocks):
        keep = [shapes.keep([block])]
        scales: dict[str, list[Option]] = defaultdict(list)
        for (name, scale), options in measured.singles.items():
            if name == block and options[0].kind in kinds:
                scales[scale] = _interpolate(shapes, options)
        attention = [_combine(qk, v) for qk in keep + scales["attn.qk"] for v in keep + scales["attn.v"]]
        mlp = keep + scales["mlp.hidden"]
        yield from _pair(shapes, number, attention + scales["attn.rank"], mlp + scales["mlp.rank"])


def _run_choices(measured: MeasuredOptions, kinds: Sequence[str]) -> Iterator[Choice]:
    """Yield the choices for several consecutive blocks as one group."""
    shapes = measured.shapes
    by_run: dict[tuple[str, ...], list[Option]] = defaultdict(list)
    for option in measured.runs:
        if option.kind in kinds:
            by_run[option.group.blocks].append(option)
    for blocks, options in by_run.items():
        parts = {part: [shapes.keep(blocks)] for part in PARTS}
        for kind, part in itertools.product(kinds, PARTS):
            same = [o for o in options if o.kind == kind and o.part == part]
            parts[part] += _interpolate(shapes, same)
        yield from _pair(shapes, list(shapes.blocks).index(blocks[0]), parts["attn"], parts["mlp"])


def _pair(shapes: Shapes, first: int, attention: Sequence[Option], mlp: Sequence[Option]) -> list[Choice]:
    """Return the best pairs of an option for the attention and one for the MLP of some blocks."""
    last = first + len(attention[0].group.blocks)
    total = shapes.params(shapes.blocks[first:last])
    best_attention, best_mlp = (undominated(part, lambda o: (-o.saved_params, o.cost)) for part in (attention, mlp))
    return frontier(
        Choice(first, last, total - a.saved_params - m.saved_params, a.cost + m.cost, (a, m))
        for a, m in itertools.product(best_attention, best_mlp)
        if not (last - first > 1 and a.kind == m.kind == "keep")
    )


def _combine(qk: Option, v: Option) -> Option:
    """Return the attention with the queries and keys of one option and the values of another."""
    group = replace(qk.group, widths=Widths(None, qk.group.widths.qk, v.group.widths.v))
    kind = "keep" if qk.kind == v.kind == "keep" else "narrow"
    return Option(kind, group, qk.saved_params + v.saved_params, qk.cost + v.cost)


def _interpolate(shapes: Shapes, options: Sequence[Option]) -> list[Option]:
    """Return the options of a scale and others between, with costs interpolated on a log scale."""
    if len(options) < 2:
        return list(options)
    ordered = sorted(options, key=lambda option: option.dial)
    dials = [option.dial for option in ordered]
    # what keeps more costs no more; noise in the measurement sometimes says otherwise
    costs = np.minimum.accumulate([max(option.cost, 1e-6) for option in ordered])
    full = _full_width(shapes, ordered[-1])
    marks = sorted({*dials, *(round(m) for m in np.linspace(dials[0], max(full - 1, dials[-1]), MARKS))})
    marked = [_with_dial(shapes, ordered[-1], mark) for mark in marks]
    between = np.exp(np.interp(marks, dials, np.log(costs)))
    if full > dials[-1]:  # above the widest that was measured, the cost falls to zero at the teacher's width
        between *= np.interp(marks, [dials[-1], full], [1.0, 0.0])
    between *= np.linspace(1.0, 1.0 - 1e-7, len(marks))  # at equal cost, prefer what keeps more
    return [replace(option, cost=float(cost)) for option, cost in zip(marked, between, strict=True)]


def _full_width(shapes: Shapes, option: Option) -> int:
    """Return the teacher's width on the scale of a narrow option; 0 for options of other kinds."""
    widths = option.group.widths
    block = shapes.model.get_submodule(option.group.donor)
    full = full_widths(block, shapes.family.narrow_attention)
    return next((getattr(full, n) for n in ("hidden", "qk", "v") if getattr(widths, n)), 0)


def _with_dial(shapes: Shapes, option: Option, dial: int) -> Option:
    """Return an option of the same kind with another width or rank."""
    group, widths = option.group, option.group.widths
    return shapes.option(
        option.kind, group.blocks, dial, shared=group.shared, ranks=dict.fromkeys(group.ranks, dial), bases=group.bases,
        widths=Widths(*(width and dial for width in (widths.hidden, widths.qk, widths.v))),
    )  # fmt: skip
