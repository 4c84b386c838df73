"""Measure what one option costs: how much the teacher's predictions change with it alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.outputs import OutputKind, deviation_of, outputs_of, outputs_on
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
        """Arguments of the teacher's blocks, per chunk, and its outputs `[B, K]`."""
        inputs: dict[str, list[BlockInput]] = {name: [] for name in self.blocks}

        def keep(name: str, call: Call) -> None:
            inputs[name].append(BlockInput(call.args[0], call.args[1:], call.kwargs))

        with recording(self.teacher, self.blocks, keep):
            return inputs, _outputs(self.teacher, images)

    def cost(self, group: Group) -> float:
        """Return KL(teacher ‖ student) of a student that differs in `group` alone, in nats."""
        first = group.blocks[0]
        source = self._align(group)
        student = _with_copies(source.model, group.blocks)
        apply_groups(student, [group], self.calibration.family)
        start_group(student, group, self.calibration, source)
        with torch.no_grad(), _entered_at(student, self.blocks, first) as entry:
            outputs = []
            for chunk, given in zip(self.judged.split(CHUNK_IMAGES), self.entries[first], strict=True):
                entry[:] = [given]
                outputs.append(student(chunk).float())
        return _nats(outputs_of(self.teacher), torch.cat(outputs), self.expected)

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
    """Return KL(teacher ‖ student) of what the models predict, nats per image.

    The kind of the teacher's outputs says what that is: probabilities of classes, of each label, or
    numbers with the teacher's deviation over these images.

    Args:
        student: in eval mode.
        teacher: in eval mode.
        images: `[B, C, H, W]`.
    """
    return _nats(outputs_of(teacher), _outputs(student, images), _outputs(teacher, images))


def divergence_and_chance(student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return the divergence of the student, and that of the teacher's mean prediction.

    Args:
        student: in eval mode.
        teacher: in eval mode.
        images: `[B, C, H, W]`.
    """
    kind, expected = outputs_of(teacher), _outputs(teacher, images)
    mean = kind.mean(expected).expand_as(expected)
    return _nats(kind, _outputs(student, images), expected), _nats(kind, mean, expected)


def shown_nats(value: float) -> str:
    """Format a divergence; one that is small is not shown as zero."""
    return f"{value:.3f} nats" if value == 0 or value >= 0.01 else f"{value:.2g} nats"


def _nats(kind: OutputKind, student: Tensor, teacher: Tensor) -> float:
    """KL(teacher ‖ student) from outputs `[B, K]`, nats per image; never negative by rounding."""
    assert kind.nats is not None  # `check_target` makes sure that a search has such a teacher
    student, teacher = student.double(), teacher.double()  # in float32, small divergences are rounding
    return max(0.0, float(kind.nats(student, teacher, deviation_of(teacher)).mean()))


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs `[B, K]` of a model for images `[B, C, H, W]`."""
    return outputs_on(model, images.split(CHUNK_IMAGES))
