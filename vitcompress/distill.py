"""How does the student learn from the teacher?  One training loop, on accelerate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitcompress.compare import Comparison, reading
from vitcompress.console import Ticker
from vitcompress.data import check_readable
from vitcompress.losses import LOSSES, Given, Outputs
from vitcompress.mixing import Mixing
from vitcompress.recipe import DistillRecipe
from vitcompress.taps import TokenSubset
from vitcompress.training import copy_parameters, lr_factor, parameter_groups, running_mean, training_student
from vitcompress.trainlog import Run, TrainLog


@dataclass(frozen=True)
class Length:
    """How long to train.

    Attributes:
        steps: optimizer steps; None where `seconds` is given.
        seconds: time.
    """

    steps: int | None
    seconds: float | None = None

    def done(self, steps: int, elapsed: float) -> float:
        """Share of the training that is over."""
        return steps / self.steps if self.steps else elapsed / self.seconds if self.seconds else 1.0


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: DataLoader[Any],
    recipe: DistillRecipe,
    *,
    blocks: Sequence[str],
    comparison: Comparison,
    mixing: Mixing,
    accelerator: Accelerator,
    ticker: Ticker,
    length: Length,
    seed: int = 0,
    skip_bad_images: bool = False,
) -> TrainLog:
    """Train `student` to do what `teacher` does, in place; both end in eval mode.

    Args:
        student: shares its parameters already.
        teacher: takes the student's views; not changed.
        loader: batches of training views, as many as `length` has steps or endless.
        recipe: losses and optimizer.
        blocks: names of all of the student's blocks, for drop path.
        comparison: which losses there are, and where the two models are read.
        mixing: mixes each batch, for both.
        accelerator: decides device and processes.
        ticker: told of every step.
        length: in steps or in time.
        seed: of the tokens that relations are taken of.
        skip_bad_images: count unreadable images instead of stopping.

    Returns:
        What happened.

    Raises:
        DivergedError: a loss or gradient that is not finite.
        DataError: an unreadable image.

    Source: weight distillation in MiniViT, arXiv:2204.07154, Sec. 3.3; the logits are soft targets of Hinton et al.
        2015, arXiv:1503.02531.
    """
    mean = running_mean(student, recipe.ema).to(accelerator.device) if recipe.ema else None
    run = Run(recipe, student, kept=mean.module if mean else student)
    optimizer = torch.optim.AdamW(parameter_groups(student, recipe), lr=recipe.lr)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    teacher = teacher.to(accelerator.device).eval()
    start = time.perf_counter()
    with (
        training_student(student, blocks, recipe),
        _losses(model, student, teacher, comparison, recipe, seed) as losses,
    ):
        for batch in loader:
            run.skipped += check_readable(batch, skip=skip_bad_images)
            if not len(batch.labels):
                continue
            done = length.done(run.steps, time.perf_counter() - start)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(done, recipe.warmup)
            draw = run.steps * accelerator.num_processes + accelerator.process_index
            images, targets = mixing(batch.images, batch.labels, draw)
            found = losses(images, targets, run.steps)
            total = torch.stack(list(found.values())).sum()
            accelerator.backward(total)
            norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            run.record(found, total, norm, lr=group["lr"], images=len(images), seconds=time.perf_counter() - start)
            optimizer.step()
            optimizer.zero_grad()
            if mean:
                mean.update_parameters(student)
            elapsed = time.perf_counter() - start
            ticker.step(
                done=min(1.0, length.done(run.steps, elapsed)),
                loss=float(total.detach()),
                images_per_second=run.images / elapsed,
            )
    if mean:
        copy_parameters(mean.module, student)
    return run.log()


@contextmanager
def _losses(
    model: nn.Module,
    student: nn.Module,
    teacher: nn.Module,
    comparison: Comparison,
    recipe: DistillRecipe,
    seed: int,
) -> Iterator[Callable[[Tensor, Tensor | None, int], Mapping[str, Tensor]]]:
    """Yield `(images, targets, step) -> weighted losses by name`, with both models tapped until the context ends.

    Args:
        model: the student as accelerate wraps it.
        student: the same, bare.
        teacher: in eval mode; not run where no loss looks at it.
        comparison: which losses there are, and where the two models are read.
        recipe: temperature, relation heads and tokens.
        seed: of the tokens.
    """
    table = {name: LOSSES[name] for name in comparison.losses}
    fields = {loss.reads for loss in table.values()}
    taught = any(loss.teacher for loss in table.values())
    tokens = TokenSubset(recipe.max_relation_tokens, seed=seed)
    with ExitStack() as stack:
        read_student = stack.enter_context(reading(student, comparison.student, fields, tokens))
        read_teacher = stack.enter_context(reading(teacher, comparison.teacher, fields, tokens))

        def compute(images: Tensor, targets: Tensor | None, step: int) -> dict[str, Tensor]:
            tokens.draw(step)
            with torch.no_grad():
                target = read_teacher(teacher(images)) if taught else Outputs(torch.empty(0))
            found = read_student(model(images))
            given = Given(recipe.temperature, recipe.relation_heads, targets)
            return {
                name: weight * table[name].compute(found, target, given)
                for name, weight in comparison.losses.items()
            }  # fmt: skip

        yield compute
