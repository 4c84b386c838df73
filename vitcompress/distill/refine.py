"""Train the blocks of a student, each to give what the teacher's block gives, before distillation.

    teacher   t ── block 0  ── t ── block 1  ── t ── [block i ] ── y
    shared                                      t ── [block i'] ── y    all of a group at once
    single    x ── block 0' ── x ── block 1' ── x ── [block i'] ── y    one after the other

A step runs and differentiates single blocks, on inputs and targets that are computed once. That
takes about half the time of a step of distillation, and gives a start much closer to the teacher
than closed forms do, as these keep neurons of the teacher and fit only what reads them. Many
images matter more than many steps: blocks learn few ones by heart.
Blocks that share matrices can only be trained together; what the student's blocks before them will
give is not known yet then.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitcompress.distill.lessons import BATCH_IMAGES, Lesson, Training, mean_error
from vitcompress.families.base import Family
from vitcompress.families.registry import family_named
from vitcompress.initialize.importance import MAX_IMAGES, token_weights
from vitcompress.initialize.inputs import BlockInput, block_inputs, block_outputs, run_visiting
from vitcompress.plans.model import Group, Plan

SINGLE_STATES = 8  # of a image, that training of single blocks holds at a time


class Refinement(NamedTuple):
    """How blocks are trained.

    Attributes:
        steps: of each block, with 32 images each.
        seed: of the order of the images.
        images: number of them at most.
        memory_bytes: for states of the residual stream; limits the images, too.
        seconds: limit for all blocks together; None for no limit.
        shared: whether groups of several blocks are trained.
    """

    steps: int
    seed: int
    images: int
    memory_bytes: float
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
        images: batches `[B, C, H, W]`, not augmented, on that device.
        how: length, order and limits.
        tell: called with the share that is done, 0–1.

    Source: ours; block by block as Li et al. 2021, arXiv:2102.05426, Sec. 3.2, reconstruct rounded
        models.
    """
    group_of = {block: group for group in groups_to_refine(plan, how) for block in group.blocks}
    if not group_of:
        return
    family = family_named(plan.family)
    inputs, some = _inputs(teacher, family.block_names(teacher)[0], images, how)
    refiner = _Refiner(student, teacher, family, group_of, some, how, tell)
    if any(len(group.blocks) > 1 for group in group_of.values()):
        refiner.train_shared(inputs)
    if any(len(group.blocks) == 1 for group in group_of.values()):
        refiner.train_single(inputs)


def _inputs(model: nn.Module, first: str, images: Iterable[Tensor], how: Refinement) -> tuple[Tensor, Tensor]:
    """Return what the first block receives, `[B, ..., C]`, and some of the images."""
    states: list[Tensor] = []
    some: list[Tensor] = []
    limit, count = how.images, 0

    def noted() -> Iterator[Tensor]:
        for batch in images:
            if count < MAX_IMAGES:
                some.append(batch)
            yield batch

    for state in block_inputs(model, first, noted()):
        limit = min(limit, max(BATCH_IMAGES, int(how.memory_bytes / (SINGLE_STATES * state[0].nbytes))))
        states.append(state[: limit - count])
        count += len(states[-1])
        if count == limit:
            break
    return torch.cat(states), torch.cat(some)


class _Refiner:
    """Runs both models, and trains each group when its inputs and targets are known.

    The models run on one image, and compute what is before the first block, and between blocks: the
    first block is given the states of all images.

    Args:
        student, teacher, family, how, tell: as in `refine_student`.
        group_of: groups by the names of their blocks.
        some: images `[B, C, H, W]` that tokens are weighted on.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, family: Family, group_of: Mapping[str, Group],
        some: Tensor, how: Refinement, tell: Callable[[float], None],
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.family, self.how, self.tell = student, teacher, family, how, tell
        self.group_of, self.names = group_of, family.block_names(teacher)
        self.weights = token_weights(teacher, family, list(group_of), [some])
        self.generator = torch.Generator().manual_seed(how.seed)
        self.image = some[:1]
        self.done = 0  # number of blocks

    def train_shared(self, inputs: Tensor) -> None:
        """Train the groups of several blocks, on the teacher's inputs.

        Args:
            inputs: of the first block, `[B, ..., C]`.
        """
        lessons: dict[str, list[Lesson]] = defaultdict(list)  # by the group's donor
        most = self._most_states()

        def visit(name: str, given: BlockInput) -> Tensor:
            block, group = self.teacher.get_submodule(name), self.group_of.get(name)
            given = given._replace(x=inputs) if name == self.names[0] else given
            target = block_outputs(block, given, BATCH_IMAGES)
            if group is not None and len(group.blocks) > 1:
                count = max(BATCH_IMAGES, int(self.how.memory_bytes / (most * target[0].nbytes)))
                lesson = self._lesson(name, given._replace(x=_first(given.x, count)), _first(target, count))
                lessons[group.donor].append(lesson)
                if name == group.blocks[-1]:
                    self._train(lessons.pop(group.donor))
            return target

        run_visiting(self.teacher, self.names, self.image, visit)

    def train_single(self, inputs: Tensor) -> None:
        """Train the groups of one block in the order of running, on the student's inputs.

        Both residual streams pass through the student's forward pass, so that whatever lies between
        blocks acts on both.

        Args:
            inputs: of the first block, `[B, ..., C]`; the student's are the teacher's.
        """

        def visit(name: str, given: BlockInput) -> Tensor:
            block, group = self.student.get_submodule(name), self.group_of.get(name)
            x, teacher_x = (inputs, inputs) if name == self.names[0] else given.x.chunk(2)
            given = given._replace(x=x)
            target = block_outputs(self.teacher.get_submodule(name), given._replace(x=teacher_x), BATCH_IMAGES)
            if group is not None and len(group.blocks) == 1:
                self._train([self._lesson(name, given, target)])
            return torch.cat([block_outputs(block, given, BATCH_IMAGES), target])

        run_visiting(self.student, self.names, self.image, visit)

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

    def _lesson(self, name: str, given: BlockInput, target: Tensor) -> Lesson:
        """Return what the student's block of a name is to learn."""
        weight = _weight(self.weights[name], self.family, target)
        variance = (weight * (target - target.flatten(0, -2).mean(0)).square()).mean()
        return Lesson(self.student.get_submodule(name), given, target, weight / variance)

    def _train(self, lessons: Sequence[Lesson]) -> None:
        """Train the blocks of a group; they get their start back where they are no better."""
        count = len(lessons)
        seconds = None if self.how.seconds is None else self.how.seconds * count / len(self.group_of)
        start = [copy.deepcopy(lesson.block.state_dict()) for lesson in lessons]
        before = mean_error(lessons)
        training = Training(lessons, self.generator)
        training.run(self.how.steps, seconds, lambda share: self.tell((self.done + count * share) / len(self.group_of)))
        if not mean_error(lessons) < before:  # or not a number
            for lesson, state in zip(lessons, start, strict=True):
                lesson.block.load_state_dict(state)
        self.done += count


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
