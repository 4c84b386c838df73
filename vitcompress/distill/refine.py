"""Train the blocks of a student, each to give what the teacher's block gives, before distillation.

    teacher   t ── block 0  ── t ── block 1  ── t ── [block i ] ── y
    shared                                      t ── [block i'] ── y    all of a group at once
    single    x ── block 0' ── x ── block 1' ── x ── [block i'] ── y    one after the other

A step runs and differentiates single blocks, on inputs and targets that are computed once. That
takes about half the time of a step of distillation, and a start much closer to the teacher than
closed forms do, as these keep neurons of the teacher and fit only what reads them.
Blocks that share matrices can only be trained together; what the student's blocks before them will
give is not known yet then.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitcompress.distill.optimizers import lr_factor, set_lr
from vitcompress.families.base import Family
from vitcompress.families.registry import family_named
from vitcompress.initialize.importance import token_weights
from vitcompress.initialize.inputs import BlockInput, block_outputs, run_block, run_visiting
from vitcompress.plans.model import Group, Plan

BATCH_IMAGES = 32
LEARNING_RATE = 3e-3  # of AdamW, for blocks of 192 channels
BETAS = (0.9, 0.98)  # steps are few
WARMUP = 0.1
CLIP_NORM = 1.0
TIMED_STEPS = 3  # that tell how long the others take
STATE_BYTES = 4 * 2**30  # of inputs and targets of blocks that share


class Refinement(NamedTuple):
    """How blocks are trained.

    Attributes:
        steps: of each block, with 32 images each.
        seed: of the order of the images.
        seconds: limit for all blocks together; None for no limit.
        shared: whether groups of several blocks are trained.
    """

    steps: int
    seed: int
    seconds: float | None = None
    shared: bool = True


def groups_to_refine(plan: Plan, how: Refinement) -> tuple[Group, ...]:
    """Return the groups that are trained: those whose blocks differ from the source's."""
    groups = []
    for group in plan.groups:
        differs = bool(group.shared) and how.shared if len(group.blocks) > 1 else not group.is_plain
        if differs and how.steps:
            groups.append(group)
    return tuple(groups)


def refine_student(
    student: nn.Module, teacher: nn.Module, plan: Plan, images: Iterable[Tensor], how: Refinement,
    tell: Callable[[float], None] = lambda done: None,
) -> None:  # fmt: skip
    """Train the blocks of `groups_to_refine`, in place.

    Args:
        student: at its start, in eval mode.
        teacher: in eval mode, on the student's device; its neurons are in the student's order.
        plan: of the student.
        images: calibration batches `[B, C, H, W]`. They are held in memory together with four
            states of the residual stream, and up to 4 GiB of those of blocks that share.
        how: length and order.
        tell: called with the share that is done, 0–1.

    Source: ours; block by block as Li et al. 2021, arXiv:2102.05426, Sec. 3.2, reconstruct rounded
        models.
    """
    group_of = {block: group for group in groups_to_refine(plan, how) for block in group.blocks}
    if not group_of:
        return
    batches = list(images)
    refiner = _Refiner(student, teacher, family_named(plan.family), group_of, batches, how, tell)
    if any(len(group.blocks) > 1 for group in group_of.values()):
        refiner.train_shared(torch.cat(batches))
    if any(len(group.blocks) == 1 for group in group_of.values()):
        refiner.train_single(torch.cat(batches + batches))


class _Refiner:
    """Runs both models, and trains each group when its inputs and targets are known.

    Args:
        student, teacher, family, how, tell: as in `refine_student`.
        group_of: groups by the names of their blocks.
        batches: calibration images.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, family: Family, group_of: Mapping[str, Group],
        batches: Sequence[Tensor], how: Refinement, tell: Callable[[float], None],
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.family, self.how, self.tell = student, teacher, family, how, tell
        self.group_of, self.names = group_of, family.block_names(teacher)
        self.weights = token_weights(teacher, family, list(group_of), batches)
        self.generator = torch.Generator().manual_seed(how.seed)
        self.done = 0  # number of blocks

    def train_shared(self, images: Tensor) -> None:
        """Train the groups of several blocks, on the teacher's inputs.

        Args:
            images: `[B, C, H, W]`.
        """
        lessons: dict[str, list[_Lesson]] = defaultdict(list)  # by the group's donor
        most = self._most_states()

        def visit(name: str, given: BlockInput) -> Tensor:
            block, group = self.teacher.get_submodule(name), self.group_of.get(name)
            target = block_outputs(block, given, BATCH_IMAGES)
            if group is not None and len(group.blocks) > 1:
                count = max(BATCH_IMAGES, STATE_BYTES // (most * target[0].nbytes))
                lesson = self._lesson(name, given._replace(x=_first(given.x, count)), _first(target, count))
                lessons[group.donor].append(lesson)
                if name == group.blocks[-1]:
                    self._train(lessons.pop(group.donor))
            return target

        run_visiting(self.teacher, self.names, images, visit)

    def train_single(self, doubled: Tensor) -> None:
        """Train the groups of one block in the order of running, on the student's inputs.

        Both residual streams pass through the student's forward pass, so that whatever lies between
        blocks acts on both.

        Args:
            doubled: all images twice, `[2B, C, H, W]`.
        """

        def visit(name: str, given: BlockInput) -> Tensor:
            block, group = self.student.get_submodule(name), self.group_of.get(name)
            x, teacher_x = given.x.chunk(2)
            given = given._replace(x=x)
            target = block_outputs(self.teacher.get_submodule(name), given._replace(x=teacher_x), BATCH_IMAGES)
            if group is not None and len(group.blocks) == 1:
                self._train([self._lesson(name, given, target)])
            return torch.cat([block_outputs(block, given, BATCH_IMAGES), target])

        run_visiting(self.student, self.names, doubled, visit)

    def _most_states(self) -> int:
        """Return how many inputs and targets of groups of several blocks are held at a time."""
        held = most = 0
        for name in self.names:
            group = self.group_of.get(name)
            if group is not None and len(group.blocks) > 1:
                held += 2
                most = max(most, held)
                held -= 2 * len(group.blocks) * (name == group.blocks[-1])
        return most

    def _lesson(self, name: str, given: BlockInput, target: Tensor) -> _Lesson:
        """Return what the student's block of a name is to learn."""
        weight = _weight(self.weights[name], self.family, target)
        variance = (weight * (target - target.flatten(0, -2).mean(0)).square()).mean()
        return _Lesson(self.student.get_submodule(name), given, target, weight / variance)

    def _train(self, lessons: Sequence[_Lesson]) -> None:
        """Train the blocks of a group; they get their start back where they are no better."""
        count = len(lessons)
        seconds = None if self.how.seconds is None else self.how.seconds * count / len(self.group_of)
        start = [copy.deepcopy(lesson.block.state_dict()) for lesson in lessons]
        before = _error(lessons)
        training = _Training(lessons, self.generator)
        training.run(self.how.steps, seconds, lambda share: self.tell((self.done + count * share) / len(self.group_of)))
        if not _error(lessons) < before:  # or not a number
            for lesson, state in zip(lessons, start, strict=True):
                lesson.block.load_state_dict(state)
        self.done += count


class _Lesson(NamedTuple):
    """What a block is to learn.

    Attributes:
        block: of the student, in eval mode.
        given: its arguments for all images.
        target: what it should give, like `given.x`.
        weight: of squared errors by token, broadcast to the target.
    """

    block: nn.Module
    given: BlockInput
    target: Tensor
    weight: Tensor

    def error(self, images: Sequence[int] | slice) -> Tensor:
        """Return the mean squared error on some images, as a share of the target's variance."""
        _, output = run_block(self.block, self.given._replace(x=self.given.x[images]))
        return (self.weight * (output - self.target[images]).square()).mean()


def _error(lessons: Sequence[_Lesson]) -> float:
    """Return the mean error on all images."""
    num_images = len(lessons[0].target)
    chunks = [slice(first, first + BATCH_IMAGES) for first in range(0, num_images, BATCH_IMAGES)]
    shares = [len(range(num_images)[chunk]) / num_images for chunk in chunks]
    with torch.no_grad():
        return sum(
            share * float(lesson.error(chunk))
            for lesson in lessons
            for chunk, share in zip(chunks, shares, strict=True)
        )


class _Training:
    """Trains blocks together.

    Args:
        lessons: one per block, on the same images.
        generator: draws the images.
    """

    def __init__(self, lessons: Sequence[_Lesson], generator: torch.Generator) -> None:
        self.lessons, self.generator = lessons, generator
        self.num_images, width = len(lessons[0].target), lessons[0].target.shape[-1]
        self.params = list({id(p): p for lesson in lessons for p in lesson.block.parameters()}.values())
        self.optimizer = torch.optim.AdamW(
            self.params, lr=LEARNING_RATE * min(1.0, 192 / width), betas=BETAS, weight_decay=0.0
        )
        self.order: list[int] = []

    def run(self, steps: int, seconds: float | None, tell: Callable[[float], None]) -> None:
        """Take some steps, or fewer if these would take too long.

        Args:
            steps: number of them.
            seconds: limit; None for no limit.
            tell: called with the share that is done, 0–1.
        """
        began, step = time.perf_counter(), 0
        while step < steps:
            self._step(lr_factor(step / steps, WARMUP))
            step += 1
            if step == TIMED_STEPS and seconds is not None:
                steps = min(steps, int(seconds * step / (time.perf_counter() - began)))
            tell(step / max(step, steps))

    @torch.enable_grad()
    def _step(self, factor: float) -> None:
        """Update the blocks once, on images that come again when all have had their turn."""
        if len(self.order) < min(BATCH_IMAGES, self.num_images):
            self.order = torch.randperm(self.num_images, generator=self.generator).tolist()
        chosen, self.order = self.order[:BATCH_IMAGES], self.order[BATCH_IMAGES:]
        for lesson in self.lessons:
            (lesson.error(chosen) / len(self.lessons)).backward()
        nn.utils.clip_grad_norm_(self.params, CLIP_NORM)
        set_lr(self.optimizer, factor)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _weight(weights: Mapping[str, Tensor], family: Family, target: Tensor) -> Tensor:
    """Return how much each token of a block's output counts, `[N, 1]` or `[H, W, 1]`.

    That is what it counts for the last layer that writes to the residual stream.
    """
    of_writers = [weight for layer, weight in weights.items() if family.writes.fullmatch(layer)]
    weight = of_writers[-1].to(target) if of_writers else target.new_ones(())
    return weight[..., None] if weight.shape == target.shape[1:-1] else target.new_ones(())


def _first(states: Tensor, count: int) -> Tensor:
    """Return the first states, without the memory of the others."""
    return states if count >= len(states) else states[:count].clone()
