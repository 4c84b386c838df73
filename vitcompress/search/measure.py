"""Measure what every option of a teacher costs.

context    a student whose blocks are all cut, in which costs are measured
moments    second moments of what the layers receive, on the images that starts are fitted to
changes    from these, what each option changes in each layer
evidence   on other images, what these changes cost

This is done in the context of each student in turn; each is judged on images of its own. Where all
blocks together do not fit in memory, some are done at a time. Options of blocks that are not done
together are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.initialize.align import align_group
from vitcompress.initialize.importance import TokenWeights, token_weights
from vitcompress.plans.make import layer_shapes
from vitcompress.plans.model import Group
from vitcompress.runtime.memory import keep_freed_memory
from vitcompress.runtime.shares import part_of
from vitcompress.search.changes import BlockChanges, block_changes, run_changes
from vitcompress.search.context import MAX_IMAGES, make_context, students_of
from vitcompress.search.evidence import DIRECTIONS, add_scores
from vitcompress.search.limits import Limits
from vitcompress.search.measured import Level, MeasuredOptions
from vitcompress.search.moments import CHUNK_IMAGES, block_moments, layers_of, means_of
from vitcompress.search.options import Option, Shapes, list_options
from vitcompress.search.progress import Part, Progress, State

# work, in passes of one image
_CONTEXT_WORK = 6.0
_MOMENTS_WORK = 2.5
_SCORES_WORK = 2.0 + 2.5 * DIRECTIONS
_CHANGES_WORK = 20.0  # of one block


@dataclass
class _Work:
    """Tells how much of the work is done.

    Attributes:
        tell: called with the share that is done, 0–1.
        total: passes of one image.
        done: the same so far.
    """

    tell: Callable[[float], None]
    total: float
    done: float = 0.0

    def add(self, amount: float) -> None:
        self.done += amount
        self.tell(self.done / self.total)


@dataclass(frozen=True)
class _Subject:
    """What is measured, on what.

    Attributes:
        shapes: the teacher, its blocks aligned where they may share.
        options: all options.
        students: numbers of the options of each student in whose context costs are measured.
        fitted: images that options are fitted to, `[N, C, H, W]`.
        judged: other images, by context.
        weights: how much each token counts in fits.
    """

    shapes: Shapes
    options: Sequence[Option]
    students: Sequence[tuple[int, ...]]
    fitted: Tensor
    judged: Sequence[Tensor]
    weights: TokenWeights

    @property
    def limits(self) -> Limits:
        return Limits(self.shapes, len(self.options))


def measure_options(
    shapes: Shapes, fitted: Tensor, judged: Tensor, memory_bytes: float, tell: Callable[[float], None],
    keep: Progress | None = None,
) -> MeasuredOptions:  # fmt: skip
    """Measure what every option costs.

    Args:
        shapes: the teacher, in eval mode, and the kinds of options to measure.
        fitted: images that options are fitted to, `[N, C, H, W]`, on the teacher's device.
        judged: other images, on which costs are measured.
        memory_bytes: memory for moments and changes.
        tell: called with the share that is done, 0–1.
        keep: keeps the state where the measurement is interrupted, and goes on from it.

    Returns:
        The options. Those of several blocks whose statistics do not fit in memory together are left
        out, and counted.
    """
    if fitted.device.type == "cpu":
        keep_freed_memory()
    subject = _subject(shapes, fitted, judged)
    parts = list(_parts(shapes, subject.options, memory_bytes))
    state = State(
        [Part(context, blocks) for context in range(len(subject.students)) for blocks in parts],
        [torch.zeros(DIRECTIONS * len(x), subject.limits.end, device=x.device) for x in subject.judged],
    )
    state = keep.resumed(state, fitted.device) if keep else state
    with keep.keeping(state) if keep else nullcontext():
        _measure(subject, state, tell, keeps_moments=keep is not None)
    together = [set(part.blocks) for part in state.parts if part.context == 0]
    measured = [
        (n, o) for n, o in enumerate(subject.options)
        if any(set(o.group.blocks) <= blocks for blocks in together)  # else it would seem to cost nothing
    ]  # fmt: skip
    levels = []
    for (params, nats), scores, student in zip(state.contexts, state.scores, subject.students, strict=True):
        costs = subject.limits.costs([(n, subject.options[n]) for n in student], scores.cpu())
        joint = nats / sum(costs) if nats > 0 and sum(costs) > 0 else 1.0  # nothing says nothing about the other
        levels.append(Level(params, subject.limits.costs(measured, scores.cpu()), joint))
    num_left_out = len(subject.options) - len(measured)
    return MeasuredOptions(shapes, [option for _, option in measured], levels, num_left_out)


def _subject(shapes: Shapes, fitted: Tensor, judged: Tensor) -> _Subject:
    """Return what is measured; each student is judged on images of its own."""
    options, aligned = list_options(shapes), replace(shapes, model=_aligned(shapes))
    # starts are fitted to all of them; costs are measured on images that nothing was fitted to
    half = -(-len(fitted) // 2)
    fitted, judged = fitted[:half], torch.cat([fitted[half:], judged])
    students = students_of(shapes, options)
    # in random order: where classes take turns, every other image may be of every other class
    judged = judged[torch.randperm(len(judged), generator=torch.Generator().manual_seed(0)).to(judged.device)]
    count = len(students) if len(judged) >= len(students) else 1
    judged_by = [judged[number % count :: count] for number in range(len(students))]
    weights = token_weights(aligned.model, shapes.family, shapes.blocks, fitted.split(CHUNK_IMAGES))
    return _Subject(aligned, options, students, fitted, judged_by, weights)


def _measure(subject: _Subject, state: State, tell: Callable[[float], None], *, keeps_moments: bool) -> None:
    """Measure what the state lacks, in place."""
    num_images = min(MAX_IMAGES, len(subject.fitted))
    context_work = [_CONTEXT_WORK * num_images if student else 0.0 for student in subject.students]
    part_work = [
        _MOMENTS_WORK * len(subject.fitted) + _SCORES_WORK * len(subject.judged[context]) + _CHANGES_WORK * len(blocks)
        for context, blocks in state.parts
    ]
    work = _Work(tell, sum(context_work) + sum(part_work))
    work.add(sum(context_work[: state.context]) + sum(part_work[: state.part]))  # done before
    while state.context < len(subject.students):
        number = state.context
        student = [subject.options[n] for n in subject.students[number]]
        judged = subject.judged[number]
        part = part_of(tell, work.done / work.total, (work.done + context_work[number]) / work.total)
        context = make_context(subject.shapes, student, subject.fitted, judged, part, subject.weights)
        work.done += context_work[number]
        if number == len(state.contexts):
            state.contexts.append((context.params, context.nats))
        while state.context == number:
            _measure_part(subject, state, context.model, work, keeps_moments=keeps_moments)


def _measure_part(subject: _Subject, state: State, model: nn.Module, work: _Work, *, keeps_moments: bool) -> None:
    """Measure the part under way, or what the state lacks of it, in place."""
    shapes, judged = subject.shapes, subject.judged[state.context]
    work.add(_MOMENTS_WORK * state.num_fitted + _SCORES_WORK * state.num_judged)  # done before
    block_moments(state, model, shapes.family, subject.fitted, subject.weights, lambda n: work.add(_MOMENTS_WORK * n))
    changes = _changes(subject, state, model, work)
    means = means_of(model, state.moments)
    if not keeps_moments:
        state.moments.clear()
    add_scores(state, model, changes, means, judged, lambda n: work.add(_SCORES_WORK * n))
    state.finish_part()


def _changes(subject: _Subject, state: State, model: nn.Module, work: _Work) -> dict[str, BlockChanges]:
    """Compute the changes of the state's blocks by all their options."""
    options = [(n, o) for n, o in enumerate(subject.options) if set(o.group.blocks) <= set(state.blocks)]
    by_run = run_changes(
        model, subject.shapes.family, [(n, o) for n, o in options if len(o.group.blocks) > 1], state.moments
    )
    changes: dict[str, BlockChanges] = {}
    for name in state.blocks:
        block: Any = model.get_submodule(name)
        own = [(n, o) for n, o in options if o.group.blocks == (name,)]
        others = [subject.limits.changes(model, name), by_run.pop(name, {})]
        changes[name] = block_changes(block, own, state.moments[name], others)
        work.add(_CHANGES_WORK)
    return changes


def _aligned(shapes: Shapes) -> nn.Module:
    """The teacher; a copy with the blocks of each stage aligned where blocks may share."""
    runs = list(shapes.runs()) if set(shapes.kinds) & {"share", "adapter", "basis"} else []
    longest: list[tuple[str, ...]] = []
    for run in sorted(runs, key=len, reverse=True):
        if not any(set(run) & set(other) for other in longest):
            longest.append(run)
    if not longest:
        return shapes.model
    model = copy.deepcopy(shapes.model)
    for run in longest:
        align_group(model, Group(run, tuple(f"{layer}.weight" for layer in layers_of(model, shapes.family, run[0]))))
    return model


def _parts(shapes: Shapes, options: Sequence[Option], memory_bytes: float) -> Iterator[tuple[str, ...]]:
    """Yield runs of blocks whose moments and changes fit in memory together, at least one each."""
    part: list[str] = []
    used = 0.0
    for block in shapes.blocks:
        size = _block_bytes(shapes, block, options)
        if part and used + size > memory_bytes:
            yield tuple(part)
            part, used = [], 0.0
        part.append(block)
        used += size
    yield tuple(part)


def _block_bytes(shapes: Shapes, block: str, options: Sequence[Option]) -> float:
    """Bytes of a block's moments, in float64, and of the changes of its options, in bfloat16."""
    layers = layer_shapes(shapes.family, shapes.model.get_submodule(block))
    moments = 8 * sum(inputs * inputs for _, inputs in layers.values())
    sizes = {name: rows * columns for name, (rows, columns) in layers.items()}
    changes = 0
    for option in options:
        if block in option.group.blocks:
            changed = {"mlp.hidden": ["mlp.fc2"], "attn.v": ["attn.proj"], "attn.qk": []}.get(option.scale)
            changed = [n for n in layers if n.startswith(option.part)] if changed is None else changed
            changes += 2 * sum(sizes[name] for name in changed)
    return float(moments + changes)
