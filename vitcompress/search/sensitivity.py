"""Measure what one option costs: how much the teacher's predictions change with it alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.initialize.align import AlignedGroup, align_group
from vitcompress.initialize.importance import token_weights
from vitcompress.initialize.inputs import BlockInput, Call, recording
from vitcompress.initialize.start import Calibration, start_group
from vitcompress.plans.model import Group
from vitcompress.surgery import apply_groups

CHUNK_IMAGES = 32


class Sensitivity:
    """A teacher on calibration images, for measuring how much it depends on some of its blocks.

    Args:
        teacher: in eval mode; not changed.
        family: of the teacher.
        fitted: images that options are fitted to, `[B, C, H, W]`, on the teacher's device.
        judged: other images, on which costs are measured.
    """

    def __init__(self, teacher: nn.Module, family: Family, fitted: Tensor, judged: Tensor) -> None:
        self.teacher, self.judged = teacher, judged
        self.blocks = family.block_names(teacher)
        inputs, _ = self._run(fitted)
        weights = token_weights(teacher, family, self.blocks, [fitted])
        self.calibration = Calibration(teacher, family, inputs, weights)
        self.entries, self.expected = self._run(judged)
        self._aligned: tuple[Any, AlignedGroup] | None = None  # the last one, with its blocks and what they share

    def _run(self, images: Tensor) -> tuple[dict[str, list[BlockInput]], Tensor]:
        """Arguments of the teacher's blocks, per chunk, and its log-probabilities `[B, K]`."""
        inputs: dict[str, list[BlockInput]] = {name: [] for name in self.blocks}

        def keep(name: str, call: Call) -> None:
            inputs[name].append(BlockInput(call.args[0], call.args[1:], call.kwargs))

        with recording(self.teacher, self.blocks, keep):
            return inputs, log_probs(self.teacher, images)

    def cost(self, group: Group) -> float:
        """Return KL(teacher ‖ student) of a student that differs in `group` alone, in nats."""
        first = group.blocks[0]
        source = self._align(group)
        student = _with_copies(source.model, group.blocks)
        apply_groups(student, [group], self.calibration.family)
        start_group(student, group, self.calibration, source)
        with torch.no_grad(), _entered_at(student, self.blocks, first) as entry:
            log_q = []
            for chunk, given in zip(self.judged.split(CHUNK_IMAGES), self.entries[first], strict=True):
                entry[:] = [given]
                log_q.append(F.log_softmax(student(chunk).float(), -1))
        return _kl(torch.cat(log_q), self.expected)

    def drop_moments(self, blocks: Sequence[str]) -> None:
        """Drop the cached moments of `blocks`, in place; no remaining option needs them."""
        for block in blocks:
            self.calibration.cache.pop(block, None)

    def _align(self, group: Group) -> AlignedGroup:
        """The model to make a group from; cached, as the next may differ in its rank alone."""
        if len(group.blocks) == 1 or not group.shared:
            return AlignedGroup(self.teacher)
        key = group.blocks, group.shared
        if self._aligned is None or self._aligned[0] != key:
            model = _with_copies(self.teacher, group.blocks)
            self._aligned = key, AlignedGroup(model, align_group(model, group))
        return self._aligned[1]


def _with_copies(teacher: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """A model with copies of the named blocks that shares all other parameters with the teacher."""
    kept = {id(p): p for p in (*teacher.parameters(), *teacher.buffers())}
    for name in blocks:
        for t in (*teacher.get_submodule(name).parameters(), *teacher.get_submodule(name).buffers()):
            kept.pop(id(t), None)
    return copy.deepcopy(teacher, kept)


@contextmanager
def _entered_at(model: nn.Module, blocks: Sequence[str], first: str) -> Iterator[list[BlockInput]]:
    """Make `model` skip the blocks before `first`, and pass it the yielded list's entry."""
    entry: list[BlockInput] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (entry[-1].x, *entry[-1].args), entry[-1].kwargs

    with ExitStack() as stack:
        for name in blocks[: blocks.index(first)]:
            block = model.get_submodule(name)
            block.forward = lambda x, *rest, **named: x
            stack.callback(delattr, block, "forward")  # restores the method of the class
        handle = model.get_submodule(first).register_forward_pre_hook(enter, with_kwargs=True)
        stack.callback(handle.remove)
        yield entry


def divergence(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """Return KL(teacher ‖ student) of the predictions, nats per image.

    Args:
        student: in eval mode.
        teacher: in eval mode.
        images: `[B, C, H, W]`.
    """
    expected = log_probs(teacher, images)
    return _kl(log_probs(student, images), expected)


def divergence_and_chance(student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return the divergence of the student, and that of the teacher's mean prediction.

    Args:
        student: in eval mode.
        teacher: in eval mode.
        images: `[B, C, H, W]`.
    """
    expected = log_probs(teacher, images)
    mean = expected.exp().mean(0).log().expand_as(expected)
    return _kl(log_probs(student, images), expected), _kl(mean, expected)


def _kl(log_q: Tensor, log_p: Tensor) -> float:
    """KL(p ‖ q) from log-probabilities `[B, K]`, nats per image; never negative by rounding."""
    return max(0.0, float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)))


def log_probs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the log-probabilities `[B, K]` that a model predicts for images `[B, C, H, W]`."""
    with torch.inference_mode():
        return torch.cat([F.log_softmax(model(x).float(), -1) for x in images.split(CHUNK_IMAGES)])
