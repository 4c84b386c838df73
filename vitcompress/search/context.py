"""Measure a teacher's layers in the context of a student that is cut throughout.

What an option costs depends on what else is cut: an error in a block grows in damaged blocks after
it, and blocks that make up for each other cannot all be cut. So costs are not measured in a whole
teacher, but in a student whose blocks are all cut to about half:

    stream of the student   x ── student's part ── + ── next part ── …      what is computed
                             └── teacher's part ── 0                        what is measured

Each of the teacher's parts sees the student's stream and gets the gradient of the student's
predictions, and adds nothing.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from vitcompress.search.divergence import divergence
from vitcompress.search.options import PARTS, Option, Shapes, merge
from vitcompress.search.student import build_student

_SHARES = {"mlp.hidden": 0.5, "attn.qk": 0.5, "attn.v": 0.6, "attn.rank": 0.5, "mlp.rank": 0.5}
"""Widths and ranks of the student, as shares of the teacher's."""


@dataclass(frozen=True)
class Context:
    """A student that is cut throughout, with the teacher's layers in it.

    Attributes:
        model: computes what the student does; its layers have the teacher's names.
        options: numbers of the options that the student is made of; empty where it is the teacher.
        nats: divergence of the student from the teacher, nats per image.
    """

    model: nn.Module
    options: tuple[int, ...]
    nats: float


def make_context(
    teacher: nn.Module, shapes: Shapes, options: Sequence[Option], fitted: Tensor, judged: Tensor,
    tell: Callable[[float], None] = lambda done: None,
) -> Context:  # fmt: skip
    """Return the context of a student whose blocks are all cut to about half.

    Args:
        teacher: in eval mode; not changed.
        shapes: the teacher's blocks.
        options: all options; where none narrows a block or lowers a rank, the teacher is the
            context.
        fitted: images that the student is fitted to, `[N, C, H, W]`.
        judged: other images, for its divergence.
        tell: called with the share that is done, 0–1.
    """
    chosen = _cut_throughout(shapes, options)
    if not chosen:
        return Context(teacher, (), 0.0)
    groups = [merge([shapes.keep([block]), *(options[n] for n in numbers)]) for block, numbers in chosen.items()]
    student = build_student(replace(shapes, transforms=()).plan(groups), teacher, fitted, tell)
    nats = divergence(student, teacher, judged)
    model = copy.deepcopy(teacher)
    for block in shapes.blocks:
        for part in PARTS:
            if hasattr(model.get_submodule(block), part):
                _measure_beside(model.get_submodule(f"{block}.{part}"), student.get_submodule(f"{block}.{part}"))
    return Context(model, tuple(number for numbers in chosen.values() for number in numbers), nats)


def _cut_throughout(shapes: Shapes, options: Sequence[Option]) -> dict[str, list[int]]:
    """Numbers of the options of each block that cut it to about half: narrow, else of low rank."""
    scales: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, option in enumerate(options):
        if option.scale in _SHARES and len(option.group.blocks) == 1:
            scales[option.group.donor, option.scale].append(number)
    chosen: dict[str, list[int]] = {block: [] for block in shapes.blocks}
    for (block, scale), numbers in scales.items():
        is_narrow = scale.endswith(".rank") and any(s in scales for s in _narrow_scales(block, scale))
        if not is_narrow:
            dials = [options[number].dial for number in numbers]
            goal = _SHARES[scale] * (min(dials) + max(dials))  # about a share of the full width
            chosen[block].append(min(numbers, key=lambda number: abs(options[number].dial - goal)))
    return chosen if any(chosen.values()) else {}


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
