"""Measure a teacher's layers in the context of a student that is cut throughout.

What an option costs depends on what else is cut: an error in a block grows in damaged blocks after
it, and blocks that make up for each other cannot all be cut. So costs are not measured in a whole
teacher, but in students whose blocks are all cut, to about a half and to about a quarter:

    stream of the student   x ── student's part ── + ── next part ── …      what is computed
                             └── teacher's part ── 0                        what is measured

Each of the teacher's parts sees the student's stream and gets the gradient of the student's
predictions, and adds nothing.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from vitcompress.initialize.importance import TokenWeights
from vitcompress.search.divergence import divergence
from vitcompress.search.options import PARTS, Option, Shapes, merge
from vitcompress.search.student import build_student

MAX_IMAGES = 128
"""That the students are fitted to; the stream of one that fits better is hardly another."""
WIDTHS = (0.5, 0.25)
"""Widths of the students, as shares of the teacher's."""
_SHARES = {"mlp.hidden": 1.0, "attn.qk": 1.0, "attn.v": 1.2, "attn.rank": 1.0, "mlp.rank": 1.0}
"""The same of each scale, as a multiple; values are the last to go."""


@dataclass(frozen=True)
class Context:
    """A student that is cut throughout, with the teacher's layers in it.

    Attributes:
        model: computes what the student does; its layers have the teacher's names.
        params: number of parameters of the student.
        nats: divergence of the student from the teacher, nats per image.
    """

    model: nn.Module
    params: int
    nats: float


def make_context(
    shapes: Shapes, options: Sequence[Option], fitted: Tensor, judged: Tensor,
    tell: Callable[[float], None] = lambda done: None, weights: TokenWeights | None = None,
) -> Context:  # fmt: skip
    """Return the context of a student.

    Args:
        shapes: the teacher, in eval mode, and its blocks; not changed.
        options: what the student is made of, each of a single block; without any, the teacher is
            the context.
        fitted: the student is fitted to the first of these images, `[N, C, H, W]`.
        judged: other images, for its divergence.
        tell: called with the share that is done, 0–1.
        weights: how much each token counts in fits; None computes it.
    """
    teacher = shapes.model
    if not options:
        return Context(teacher, shapes.unchanged_plan().size.teacher_params, 0.0)
    chosen: dict[str, list[Option]] = {block: [shapes.keep([block])] for block in shapes.blocks}
    for option in options:
        chosen[option.group.donor].append(option)
    plan = replace(shapes, transforms=()).plan(map(merge, chosen.values()))
    student = build_student(plan, teacher, fitted[:MAX_IMAGES], tell, weights)
    nats = divergence(student, teacher, judged)
    model = copy.deepcopy(teacher)
    for block in shapes.blocks:
        for part in PARTS:
            if hasattr(model.get_submodule(block), part):
                _measure_beside(model.get_submodule(f"{block}.{part}"), student.get_submodule(f"{block}.{part}"))
    return Context(model, plan.size.student_params, nats)


def students_of(shapes: Shapes, options: Sequence[Option]) -> list[tuple[int, ...]]:
    """Return numbers of the options of each student in whose context costs are measured.

    Args:
        shapes: the teacher's blocks.
        options: all options.

    Returns:
        The largest student first; a single one without options where none narrows a block or
        lowers a rank.
    """
    scales: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, option in enumerate(options):
        if option.scale in _SHARES and len(option.group.blocks) == 1:
            scales[option.group.donor, option.scale].append(number)
    students = (tuple(_cut(scales, options, width)) for width in WIDTHS)
    return list(dict.fromkeys(students))


def _cut(scales: Mapping[tuple[str, str], Sequence[int]], options: Sequence[Option], width: float) -> Iterator[int]:
    """Yield numbers of the options that cut each part about so far: narrow, else of low rank."""
    for (block, scale), numbers in scales.items():
        is_narrow = scale.endswith(".rank") and any(s in scales for s in _narrow_scales(block, scale))
        if not is_narrow:
            dials = [options[number].dial for number in numbers]
            goal = width * _SHARES[scale] * (min(dials) + max(dials))  # about a share of the full width
            yield min(numbers, key=lambda number: abs(options[number].dial - goal))


def _narrow_scales(block: str, scale: str) -> list[tuple[str, str]]:
    part = scale.partition(".")[0]
    return [(block, name) for name in _SHARES if name.startswith(part) and not name.endswith(".rank")]


def _measure_beside(part: Any, student_part: nn.Module) -> None:
    """Make a teacher's part return what the student's part does, and run beside it, in place."""
    part.forward = partial(_forward, part, student_part)


def _forward(part: nn.Module, student_part: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    alone = x.detach().requires_grad_(x.requires_grad)  # its layers get gradients; the stream gets none from here
    measured = type(part).forward(part, alone, *args, **kwargs)
    output: Tensor = student_part(x, *args, **kwargs) + (measured - measured.detach())
    return output
