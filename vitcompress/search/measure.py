"""Measure what every option of a teacher costs.

context    a student whose blocks are all cut, in which costs are measured
moments    second moments of what the layers receive, on the images that starts are fitted to
changes    from these, what each option changes in each layer
evidence   on other images, what these changes cost

Where all blocks together do not fit in memory, some are done at a time. Options of blocks that are
not done together are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.narrow import is_plain_attention
from vitcompress.initialize.align import align_group
from vitcompress.initialize.importance import TokenWeights, token_weights
from vitcompress.initialize.inputs import Call, run_recorded
from vitcompress.initialize.regression import Moments
from vitcompress.plans.make import layer_shapes
from vitcompress.plans.model import Group
from vitcompress.runtime.shares import part_of
from vitcompress.search.changes import BlockChanges, LayerChanges, block_changes, run_changes
from vitcompress.search.context import Context, make_context
from vitcompress.search.evidence import DIRECTIONS, add_scores, nats_of
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.options import Option, Shapes, list_options
from vitcompress.search.progress import BlockMoments, Progress, State

CHUNK_IMAGES = 32

# work, in passes of one image
_MOMENTS_WORK = 2.5
_SCORES_WORK = 2.0 + 2.5 * DIRECTIONS
_CHANGES_WORK = 20.0  # of one block

_CONTEXT_SHARE = 0.25  # of the time

_EXACT = {"mlp.hidden", "attn.v", "attn.skip", "mlp.skip"}
"""Scales that only change what is added to the stream; nothing nonlinear lies between."""


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
    options = list_options(shapes)
    teacher, family = _aligned(shapes), shapes.family
    # starts are fitted to all of them; costs are measured on images that nothing was fitted to
    fitted, judged = fitted[: -(-len(fitted) // 2)], torch.cat([fitted[-(-len(fitted) // 2) :], judged])
    context = make_context(teacher, shapes, options, fitted, judged, part_of(tell, 0.0, _CONTEXT_SHARE))
    model, before = context.model, _CONTEXT_SHARE if context.options else 0.0
    limits = _Limits(shapes, len(options))
    scores = torch.zeros(DIRECTIONS * len(judged), limits.end, device=judged.device)
    state = State(list(_parts(shapes, options, memory_bytes)), scores)
    state = keep.resumed(state, fitted.device) if keep else state
    weights = token_weights(teacher, family, shapes.blocks, fitted.split(CHUNK_IMAGES))
    part_work = _MOMENTS_WORK * len(fitted) + _SCORES_WORK * len(judged)
    total = _CHANGES_WORK * len(shapes.blocks) + len(state.parts) * part_work
    done = 0.0

    def work(amount: float) -> None:
        nonlocal done
        done += amount
        tell(before + (1 - before) * done / total)

    with keep.keeping(state) if keep else nullcontext():
        work(state.part * part_work + _CHANGES_WORK * sum(map(len, state.parts[: state.part])))  # before
        while state.part < len(state.parts):
            work(_MOMENTS_WORK * state.num_fitted + _SCORES_WORK * state.num_judged)  # before
            block_moments(state, model, family, fitted, weights, lambda n: work(_MOMENTS_WORK * n))
            numbered = [(n, o) for n, o in enumerate(options) if set(o.group.blocks) <= set(state.blocks)]
            changes = _changes(model, family, state.blocks, numbered, state.moments, limits, work)
            means = _means(model, state.moments)
            if keep is None:
                state.moments.clear()
            add_scores(state, model, changes, means, judged, lambda n: work(_SCORES_WORK * n))
            state.finish_part()
    scores = state.scores.cpu()
    parts = [set(blocks) for blocks in state.parts]
    measured = [
        _measured(o, n, scores, limits) for n, o in enumerate(options)
        if any(set(o.group.blocks) <= part for part in parts)  # else it has no scores, and would seem to cost nothing
    ]  # fmt: skip
    return MeasuredOptions(shapes, measured, _joint(context, scores, options, limits), len(options) - len(measured))


def _joint(context: Context, scores: Tensor, options: Sequence[Option], limits: _Limits) -> float:
    """Return the cost of the context's student, as a multiple of the sum of its options' costs.

    Where either is nothing, they say nothing about each other, and the multiple is one.
    """
    total = sum(_measured(options[number], number, scores, limits).nats for number in context.options)
    return context.nats / total if context.nats > 0 and total > 0 else 1.0


def _means(model: nn.Module, moments: BlockMoments) -> dict[str, Tensor]:
    """Mean inputs of the layers that have a bias, by full name."""
    return {
        f"{block}.{layer}": m.mean
        for block in moments for layer, m in moments[block].items()
        if getattr(_submodule(model, f"{block}.{layer}"), "bias", None) is not None
    }  # fmt: skip


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # queries and keys are no modules
        return None


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
        align_group(model, Group(run, tuple(f"{layer}.weight" for layer in _layers(model, shapes.family, run[0]))))
    return model


def _layers(model: nn.Module, family: Family, block: str) -> list[str]:
    return list(layer_shapes(family, model.get_submodule(block)))


def block_moments(
    state: State,
    model: nn.Module,
    family: Family,
    images: Tensor,
    weights: TokenWeights,
    tell: Callable[[int], None],
) -> None:
    """Compute the moments of what the layers of the state's blocks receive, in place.

    Of plain attention also those of queries and keys, `attn.q` and `attn.k`.

    Args:
        state: says which blocks, and how many images are done; gets the moments.
        model: in eval mode.
        family: of the model.
        images: `[N, C, H, W]`, on the model's device.
        weights: how much each token counts.
        tell: called with a number of images that are done.
    """
    places = {f"{block}.{layer}": (block, layer) for block in state.blocks for layer in _layers(model, family, block)}

    def add(name: str, call: Call) -> None:
        block, layer = places[name]
        moments = state.moments[block]
        moments[layer].add(call.input, weight=weights[block][layer])
        if layer == "attn.qkv" and is_plain_attention(model.get_submodule(f"{block}.attn")):
            queries, keys, _ = call.output.chunk(3, dim=-1)
            moments["attn.q"].add(queries, weight=weights[block][layer])
            moments["attn.k"].add(keys, weight=weights[block][layer])

    for chunk in images[state.num_fitted :].split(CHUNK_IMAGES):
        if not len(chunk):  # all are done
            break
        with state.step():
            run_recorded(model, [chunk], places, add)
            state.num_fitted += len(chunk)
        tell(len(chunk))


@dataclass(frozen=True)
class _Limits:
    """Numbers for the cost of leaving out each part of each block, beside those of options.

    Attributes:
        shapes: the teacher's blocks.
        start: the first number.
    """

    shapes: Shapes
    start: int

    @property
    def end(self) -> int:
        return self.start + 2 * len(self.shapes.blocks)

    def number(self, block: str, part: str) -> int:
        return self.start + 2 * list(self.shapes.blocks).index(block) + (part == "mlp")

    def changes(self, model: nn.Module, block: str) -> dict[str, LayerChanges]:
        """The changes of one block by leaving out each part: of the layer that writes."""
        changes = {}
        for layer in filter(self.shapes.family.writes.fullmatch, _layers(model, self.shapes.family, block)):
            weight = model.get_parameter(f"{block}.{layer}.weight").detach()
            number = self.number(block, layer.partition(".")[0])
            changes[layer] = LayerChanges.on(weight.device, [number], -weight[None])
        return changes


def _changes(
    model: nn.Module, family: Family, blocks: Sequence[str], options: Sequence[tuple[int, Option]],
    moments: Mapping[str, Mapping[str, Moments]], limits: _Limits, work: Callable[[float], None],
) -> dict[str, BlockChanges]:  # fmt: skip
    """Compute the changes of some blocks by all their options."""
    by_run = run_changes(model, family, [(n, o) for n, o in options if len(o.group.blocks) > 1], moments)
    changes: dict[str, BlockChanges] = {}
    for name in blocks:
        block: Any = model.get_submodule(name)
        own = [(n, o) for n, o in options if o.group.blocks == (name,)]
        changes[name] = block_changes(block, own, moments[name], [limits.changes(model, name), by_run.pop(name, {})])
        work(_CHANGES_WORK)
    return changes


def _measured(option: Option, number: int, scores: Tensor, limits: _Limits) -> Option:
    """Return an option with its cost.

    Changes before something nonlinear are overstated where they are large: no way to change a part
    costs more than leaving it out.
    """
    nats = nats_of(scores[:, number])
    if option.scale not in _EXACT:
        limit = sum(nats_of(scores[:, limits.number(block, option.part)]) for block in option.group.blocks)
        nats = nats / (1 + nats / limit) if limit > 0 else nats
    return replace(option, nats=nats)


def _parts(shapes: Shapes, options: Sequence[Option], memory_bytes: float) -> Iterator[list[str]]:
    """Yield runs of blocks whose moments and changes fit in memory together, at least one each."""
    part: list[str] = []
    used = 0.0
    for block in shapes.blocks:
        size = _block_bytes(shapes, block, options)
        if part and used + size > memory_bytes:
            yield part
            part, used = [], 0.0
        part.append(block)
        used += size
    yield part


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
