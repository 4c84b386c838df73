"""How does the student learn from the teacher?  One training loop, on accelerate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitcompress.compare import Comparison, reading
from vitcompress.console import Ticker
from vitcompress.losses import LOSSES, Given, Outputs
from vitcompress.mixing import Mixing
from vitcompress.recipe import DistillRecipe
from vitcompress.taps import TokenSubset
from vitcompress.training import copy_parameters, lr_factor, optimizers, running_mean, set_lr, training_student
from vitcompress.trainlog import Run, TrainLog


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    loader: DataLoader[Any],
    recipe: DistillRecipe,
    *,
    blocks: Sequence[str],
    comparison: Comparison,
    mixing: Mixing,
    matrices: Collection[str],
    fade: Callable[[float], None],
    accelerator: Accelerator,
    ticker: Ticker,
    num_steps: int | None,
    seconds: float | None = None,
    seed: int = 0,
    skip_bad_images: bool = False,
) -> TrainLog:
    """Train `student` to do what `teacher` does, or what labels say, in place; both end in eval mode.

    Args:
        student: shares its parameters already.
        teacher: takes the student's views; not changed. None where no loss looks at one.
        loader: batches of training views, `num_steps` of them or endless.
        recipe: losses and optimizer.
        blocks: names of all of the student's blocks, for drop path.
        comparison: which losses there are, and where the two models are read.
        mixing: mixes each batch, for both.
        matrices: names of the blocks' matrices, for the optimizer.
        fade: told of the share of the training that is over, before each step.
        accelerator: decides device and processes.
        ticker: told of every step.
        num_steps: length in steps; None where `seconds` is given.
        seconds: length in time.
        seed: of the tokens that relations are taken of.
        skip_bad_images: count unreadable images instead of stopping.

    Returns:
        What happened.

    Raises:
        DivergedError: a loss or gradient that is not finite.
        DataError: an unreadable image, or none that is readable.

    Source: weight distillation in MiniViT, arXiv:2204.07154, Sec. 3.3; the logits are soft targets of Hinton et al.
        2015, arXiv:1503.02531.
    """
    mean = running_mean(student, recipe.ema).to(accelerator.device) if recipe.ema else None
    model, loader, *updates = accelerator.prepare(student, loader, *optimizers(student, recipe, matrices))
    teacher = teacher.to(accelerator.device).eval() if teacher else None
    run = Run(recipe, student, num_steps, seconds, kept=mean.module if mean else student)
    with (
        training_student(student, blocks, recipe),
        _losses(model, student, teacher, comparison, recipe, seed) as losses,
    ):
        for batch in loader:
            done = run.done()
            if done >= 1:
                break
            run.count_bad(batch, skip=skip_bad_images)
            if len(batch.labels) == 0:
                continue
            fade(done)
            factor = lr_factor(done, recipe.warmup)
            for optimizer in updates:
                set_lr(optimizer, factor)
            draw = run.steps * accelerator.num_processes + accelerator.process_index
            images, targets = mixing(batch.images, batch.labels, draw)
            found = losses(images, targets, run.steps)
            total = torch.stack(list(found.values())).sum()
            accelerator.backward(total)
            norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            run.record({"loss": total, **found}, norm, lr=recipe.peak_lr * factor, images=len(images))
            for optimizer in updates:
                optimizer.step()
                optimizer.zero_grad()
            if mean:
                mean.update_parameters(student)
            ticker.step(done=run.done(), loss=float(total.detach()), images_per_second=run.images_per_second())
    if mean:
        copy_parameters(mean.module, student)
    if run.steps:
        with torch.inference_mode():
            run.check_finite(student(images))  # the last update is checked by no later loss
    return run.log()


@contextmanager
def _losses(
    model: nn.Module,
    student: nn.Module,
    teacher: nn.Module | None,
    comparison: Comparison,
    recipe: DistillRecipe,
    seed: int,
) -> Iterator[Callable[[Tensor, Tensor | None, int], Mapping[str, Tensor]]]:
    """Yield `(images, targets, step) -> weighted losses by name`, with both models tapped until the context ends.

    Args:
        model: the student as accelerate wraps it.
        student: the same, bare.
        teacher: in eval mode; not run where no loss looks at it, which it must where it is None.
        comparison: which losses there are, and where the two models are read.
        recipe: temperature, relation heads and tokens.
        seed: of the tokens.
    """
    table = {name: LOSSES[name] for name in comparison.losses}
    fields = {loss.reads for loss in table.values()}
    taught = teacher if any(loss.teacher for loss in table.values()) else None
    tokens = TokenSubset(recipe.max_relation_tokens, seed=seed)
    with ExitStack() as stack:
        read_student = stack.enter_context(reading(student, comparison.student, fields, tokens))
        read_teacher = stack.enter_context(reading(taught, comparison.teacher, fields, tokens)) if taught else None

        def compute(images: Tensor, targets: Tensor | None, step: int) -> dict[str, Tensor]:
            tokens.draw(step)
            with torch.no_grad():
                target = read_teacher(taught(images)) if taught and read_teacher else Outputs(torch.empty(0))
            found = read_student(model(images))
            given = Given(recipe.temperature, recipe.relation_heads, targets)
            return {
                name: weight * table[name].compute(found, target, given)
                for name, weight in comparison.losses.items()
            }  # fmt: skip

        yield compute
