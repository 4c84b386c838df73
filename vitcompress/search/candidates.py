"""Which plan is best for a target?  Options are measured one by one, put together exactly, and the best few are built.

measure   what every option costs alone                      `sensitivity`
allocate  the cheapest sum of options within the budget      `allocate`: of all kinds together, and of each alone
build     the start of each of these, and its real cost      costs add up only nearly, and kinds differ in that
even      the best of these with blocks more alike           where much is cut, costs do not add up at all
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn

from vitcompress.families.find import family_of
from vitcompress.families.narrow import full_widths
from vitcompress.families.widths import Widths
from vitcompress.initialize.align import aligned
from vitcompress.initialize.start import start_student
from vitcompress.plans.make import plan_of
from vitcompress.plans.model import Group, Plan
from vitcompress.search.allocate import Choice, allocate, frontier
from vitcompress.search.options import PARTS, Option, Shapes, merged, run_options, single_options
from vitcompress.search.sensitivity import CHUNK_IMAGES, Sensitivity, divergence
from vitcompress.surgery import apply_plan

MARKS = 24
"""Settings per scale that the allocation chooses from, between those that were measured."""

CLOSE = 0.015
"""Of a budget: how much less a plan has, where one can be made that close, though a smaller one may cost no more."""

_EVEN_ROUNDS = 16


@dataclass(frozen=True)
class Candidate:
    """One way of reaching the target.

    Attributes:
        name: the kinds of options that it was put together from.
        plan: what it is.
        predicted: sum of its options' costs, nats per image; nan where it was not put together from options.
        cost: that of its start on images that it was not fitted to, nats per image; nan where it was not built.
    """

    name: str
    plan: Plan
    predicted: float
    cost: float = math.nan


@dataclass(frozen=True)
class Measured:
    """A teacher whose options are measured.

    Attributes:
        shapes: of the teacher's blocks.
        singles: options of one block, by block and scale.
        runs: options of several blocks together.
    """

    shapes: Shapes
    singles: Mapping[tuple[str, str], Sequence[Option]]
    runs: Sequence[Option]
    _choices: dict[tuple[str, ...], list[Choice]] = field(default_factory=dict, compare=False, repr=False)

    def choices(self, kinds: Sequence[str]) -> list[Choice]:
        """Every choice of some kinds that is worth having; made once, for a search asks again for each budget."""
        if tuple(kinds) not in self._choices:
            self._choices[tuple(kinds)] = list(_choices(self, kinds))
        return self._choices[tuple(kinds)]

    def rows(self) -> Iterator[Option]:
        """Every option that was measured."""
        for options in self.singles.values():
            yield from options
        yield from self.runs


def measure(
    teacher: nn.Module,
    fitted: Tensor,
    judged: Tensor,
    kinds: Sequence[str],
    *,
    name: str,
    tell: Callable[[float], None],
) -> Measured:
    """Measure what every option costs.

    Args:
        teacher: in eval mode; not changed.
        fitted: images that options are fitted to, `[B, C, H, W]`, on the teacher's device.
        judged: others, that their costs are measured on.
        kinds: of options, of `KINDS`.
        name: what the user called the teacher.
        tell: told the share that is done, 0–1.
    """
    family = family_of(teacher, name)
    shapes = Shapes(teacher, family, family.block_names(teacher), kinds)
    singles = [(block, scale, option) for block in shapes.blocks for scale, option in single_options(shapes, block)]
    runs = list(run_options(shapes))
    bench = Sensitivity(teacher, family, fitted, judged)
    total, done = max(1, len(singles) + len(runs)), 0
    measured: dict[tuple[str, str], list[Option]] = defaultdict(list)
    found: list[Option] = []
    for block, options in itertools.groupby(singles, key=lambda single: single[0]):
        for _, scale, option in options:
            measured[block, scale].append(replace(option, cost=bench.cost(option.group)))
            tell((done := done + 1) / total)
        bench.drop_moments([block])
    for option in runs:
        found.append(replace(option, cost=bench.cost(option.group)))
        tell((done := done + 1) / total)
        bench.drop_moments(
            shapes.blocks[: shapes.blocks.index(option.group.blocks[0])]
        )  # runs come by their first blocks
    return Measured(shapes, measured, found)


def candidates(measured: Measured, budget: int, token_kernel: int, transforms: tuple[str, ...]) -> list[Candidate]:
    """The cheapest plans within a budget, of all kinds together and of each kind alone; cheapest first.

    Args:
        measured: the options.
        budget: most parameters of the whole student.
        token_kernel: of the token convolution.
        transforms: of every block.
    """
    shapes = measured.shapes
    untouched = [Group((block,), ()) for block in shapes.blocks]
    plain = plan_of(shapes.model, shapes.family, untouched, transforms, token_kernel).size
    saved_at_least = plain.student_params - budget
    found: dict[str, Candidate] = {}
    mixes = [tuple(shapes.kinds), *((kind,) for kind in shapes.kinds)] if len(shapes.kinds) > 1 else [shapes.kinds]
    for kinds in mixes:
        choices = measured.choices(kinds)
        # the allocation counts what is kept: parameters of the blocks
        most = shapes.params(shapes.blocks) - saved_at_least
        picked = allocate(choices, len(shapes.blocks), most, most - round(CLOSE * budget))
        if picked is None:
            continue
        groups = tuple(merged(*choice.key) for choice in picked[0])
        plan = plan_of(shapes.model, shapes.family, groups, transforms, token_kernel)
        found.setdefault(repr(groups), Candidate(", ".join(kinds), plan, picked[1]))
    return sorted(found.values(), key=lambda candidate: candidate.predicted)


def evened(plan: Plan, shapes: Shapes, budget: int, share: float) -> Plan | None:
    """The plan with the widths of its narrow blocks nearer to one another, in proportion to the teacher's.

    Options are measured in a teacher that is whole elsewhere. Where all blocks are cut deep, that says too little of
    how much less one may have than another.

    Args:
        plan: any.
        shapes: of the teacher's blocks.
        budget: most parameters of the whole student.
        share: of the differences, as logarithms, that is left, 0–1.

    Returns:
        None where nothing is narrow, or widths in such proportions do not come close to the budget.
    """
    if all(group.widths == Widths() for group in plan.groups):
        return None

    def made(scales: Sequence[float]) -> Plan:
        groups = [_scaled(shapes, group, share, scale) for group, scale in zip(plan.groups, scales, strict=True)]
        return plan_of(shapes.model, shapes.family, groups, plan.transforms, plan.token_kernel)

    low, high = 0.0, 1.0
    for _ in range(_EVEN_ROUNDS):
        middle = (low + high) / 2
        fits = made([middle] * len(plan.groups)).size.student_params <= budget
        low, high = (middle, high) if fits else (low, middle)
    scales = [low] * len(plan.groups)
    for number in range(len(scales)):  # widths are whole numbers: what is left goes to some blocks
        more = [*scales[:number], high, *scales[number + 1 :]]
        scales = more if made(more).size.student_params <= budget else scales
    found = made(scales)
    return found if (1 - CLOSE) * budget <= found.size.student_params <= budget else None


def _scaled(shapes: Shapes, group: Group, share: float, scale: float) -> Group:
    """A block of its own with widths `scale · full · (width / full) ** share`; any other group as it is."""
    if len(group.blocks) > 1 or group.shared or group.ranks:
        return group
    full = full_widths(shapes.model.get_submodule(group.donor), shapes.family.narrow_attention)
    widths: dict[str, int | None] = {}
    for name in ("hidden", "qk", "v"):
        most, width = getattr(full, name), getattr(group.widths, name)
        count = most and max(1, int(scale * most * ((width or most) / most) ** share))
        widths[name] = count if count != most else None
    return replace(group, widths=Widths(**widths))


def smallest(measured: Measured, token_kernel: int, transforms: tuple[str, ...]) -> Plan:
    """The plan with the fewest parameters that the options allow."""
    shapes = measured.shapes
    choices = measured.choices(shapes.kinds)
    best: list[tuple[int, list[Choice]]] = [(0, [])]
    for end in range(1, len(shapes.blocks) + 1):
        ending = [c for c in choices if c.last == end]
        best.append(min(((best[c.first][0] + c.params, [*best[c.first][1], c]) for c in ending), key=lambda t: t[0]))
    groups = [merged(*choice.key) for choice in best[-1][1]]
    return plan_of(shapes.model, shapes.family, groups, transforms, token_kernel)


def build(candidate: Candidate, teacher: nn.Module, images: Tensor, held_out: Tensor) -> Candidate:
    """The candidate with the cost of its start.

    Args:
        candidate: any.
        teacher: in eval mode.
        images: for calibration, `[B, C, H, W]`.
        held_out: others, to measure on.
    """
    return replace(candidate, cost=divergence(started(candidate.plan, teacher, images), teacher, held_out))


def started(plan: Plan, teacher: nn.Module, images: Tensor) -> nn.Module:
    """The student of a plan as it starts, fitted to `images`, in eval mode."""
    source = aligned(teacher, plan)
    student = copy.deepcopy(source)
    apply_plan(student, plan)
    start_student(student, source, plan, lambda: images.split(CHUNK_IMAGES), "calibrated")
    return student.eval()


def _choices(measured: Measured, kinds: Sequence[str]) -> Iterator[Choice]:
    """Every way worth having of making every run of blocks as one group, of some kinds."""
    shapes = measured.shapes
    for number, block in enumerate(shapes.blocks):
        attention = [shapes.keep([block], "attn")]
        scales = {scale: _marks(shapes, options) for (b, scale), options in measured.singles.items() if b == block}
        if "narrow" in kinds:
            attention = _both(shapes, attention + scales.get("attn.qk", []), attention + scales.get("attn.v", []))
        if "low_rank" in kinds:
            attention += scales.get("attn.rank", [])
        mlp = [shapes.keep([block], "mlp")]
        mlp += scales.get("mlp.hidden", []) if "narrow" in kinds else []
        mlp += scales.get("mlp.rank", []) if "low_rank" in kinds else []
        yield from _crossed(shapes, number, number + 1, attention, mlp)
    by_run: dict[tuple[str, ...], list[Option]] = defaultdict(list)
    for option in measured.runs:
        if option.kind in kinds:
            by_run[option.group.blocks].append(option)
    for blocks, options in by_run.items():
        first = list(shapes.blocks).index(blocks[0])
        parts = {part: [shapes.keep(blocks, part)] for part in PARTS}
        for kind in kinds:
            for part in PARTS:
                same = [o for o in options if o.kind == kind and o.part == part]
                parts[part] += _marks(shapes, same) if len(same) > 1 else same
        yield from _crossed(shapes, first, first + len(blocks), parts["attn"], parts["mlp"])


def _crossed(
    shapes: Shapes, first: int, last: int, attention: Sequence[Option], mlp: Sequence[Option]
) -> Iterator[Choice]:
    """The best pairs of an option for the attention and one for the MLP."""
    total = shapes.params(shapes.blocks[first:last])
    pairs = [
        Choice(first, last, total - a.saved_params - m.saved_params, a.cost + m.cost, (a, m))
        for a in _best(attention)
        for m in _best(mlp)
        if not (last - first > 1 and a.kind == m.kind == "keep")
    ]
    yield from frontier(pairs)


def _best(options: Sequence[Option]) -> list[Option]:
    """The options that no other beats in both what they save and what they cost."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (-o.saved_params, o.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _both(shapes: Shapes, qk: Sequence[Option], v: Sequence[Option]) -> list[Option]:
    """Attentions with fewer channels of both kinds."""
    return [
        Option(
            "keep" if a.kind == b.kind == "keep" else "narrow",
            replace(a.group, widths=Widths(None, a.group.widths.qk, b.group.widths.v)),
            a.saved_params + b.saved_params,
            a.cost + b.cost,
        )
        for a in qk
        for b in v
    ]


def _marks(shapes: Shapes, options: Sequence[Option]) -> list[Option]:
    """Options measured and between those measured, their costs by interpolation of the logarithm."""
    if len(options) < 2:
        return list(options)
    ordered = sorted(options, key=lambda option: option.dial)
    dials = [option.dial for option in ordered]
    # what keeps more costs no more; noise of the measurement says otherwise now and then
    costs = np.minimum.accumulate([max(option.cost, 1e-6) for option in ordered])
    full = _full_width(shapes, ordered[-1])
    marks = sorted({*dials, *(round(m) for m in np.linspace(dials[0], max(full - 1, dials[-1]), MARKS))})
    made = [_dialled(shapes, ordered[-1], mark) for mark in marks]
    between = np.exp(np.interp(marks, dials, np.log(costs)))
    if full > dials[-1]:  # beyond the widest that was measured the cost falls to nothing, at the teacher's width
        between *= np.interp(marks, [dials[-1], full], [1.0, 0.0])
    between *= np.linspace(1.0, 1.0 - 1e-7, len(marks))  # of what costs the same, the one that keeps more
    return [replace(option, cost=float(cost)) for option, cost in zip(made, between, strict=True)]


def _full_width(shapes: Shapes, option: Option) -> int:
    """The teacher's width on the scale that a narrow option is a mark of; 0 for options of other kinds."""
    widths = option.group.widths
    block = shapes.model.get_submodule(option.group.donor)
    full = full_widths(block, shapes.family.narrow_attention)
    return next((getattr(full, n) for n in ("hidden", "qk", "v") if getattr(widths, n)), 0)


def _dialled(shapes: Shapes, like: Option, dial: int) -> Option:
    """An option of the same kind with another width or rank."""
    group = like.group
    widths = Widths(*(w and dial for w in (group.widths.hidden, group.widths.qk, group.widths.v)))
    ranks = dict.fromkeys(group.ranks, dial)
    made = {"shared": group.shared, "ranks": ranks, "bases": group.bases, "widths": widths}
    return shapes.option(like.kind, group.blocks, like.part, dial, **made)
