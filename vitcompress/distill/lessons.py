"""Train blocks, each to give some targets for some inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitcompress.distill.optimizers import lr_factor, set_lr
from vitcompress.initialize.inputs import BlockInput, run_block

BATCH_IMAGES = 32
LEARNING_RATE = 3e-3  # of AdamW, for blocks of 192 channels
BETAS = (0.9, 0.98)  # steps are few
WARMUP = 0.1
CLIP_NORM = 1.0
TIMED_STEPS = 3  # that tell how long the others take
JUDGED_IMAGES = 256  # that tell whether a block is better


class Lesson(NamedTuple):
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


def mean_error(lessons: Sequence[Lesson]) -> float:
    """Return the mean error on up to 256 images."""
    num_images = min(JUDGED_IMAGES, len(lessons[0].target))
    chunks = [slice(first, first + BATCH_IMAGES) for first in range(0, num_images, BATCH_IMAGES)]
    shares = [len(range(num_images)[chunk]) / num_images for chunk in chunks]
    with torch.no_grad():
        return sum(
            share * float(lesson.error(chunk))
            for lesson in lessons
            for chunk, share in zip(chunks, shares, strict=True)
        )


class Training:
    """Trains blocks together.

    Args:
        lessons: one per block, on the same images.
        generator: draws the images.
    """

    def __init__(self, lessons: Sequence[Lesson], generator: torch.Generator) -> None:
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
