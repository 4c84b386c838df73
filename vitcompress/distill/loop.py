"""How does the student learn from the teacher?  One training loop, on accelerate."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vitcompress.data.loaders import Batch
from vitcompress.data.mixing import Mixing
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.distill.hooks import TokenSubset
from vitcompress.distill.log import TrainLog
from vitcompress.distill.losses import LOSSES, Given, Outputs
from vitcompress.distill.matching import Matching, reading
from vitcompress.distill.run import Agreed, Run
from vitcompress.distill.teacher_cache import TeacherCache
from vitcompress.distill.training import (
    compiling,
    copy_parameters,
    lr_factor,
    optimizers,
    running_mean,
    set_lr,
    training_student,
)
from vitcompress.errors import DataError
from vitcompress.recipe import DistillRecipe
from vitcompress.runtime.console import Ticker
from vitcompress.runtime.processes import gathered, mean_of
from vitcompress.runtime.signals import deferring, pending

_NO_STEP = -1
Compute = Callable[[nn.Module, Tensor, Tensor | None, int, int], Mapping[str, Tensor]]


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Callable[[int], Iterable[Batch]],
    recipe: DistillRecipe,
    *,
    blocks: Sequence[str],
    comparison: Matching,
    mixing: Mixing,
    matrices: Collection[str],
    fade: Callable[[float], None],
    accelerator: Accelerator,
    ticker: Ticker,
    input_size: tuple[int, int, int],
    num_steps: int | None,
    seconds: float | None = None,
    seed: int = 0,
    skip_bad_images: bool = False,
    checkpoints: Checkpoints | None = None,
    cache: TeacherCache | None = None,
    compiled: bool = False,
) -> TrainLog:
    """Train `student` to do what `teacher` does, or what labels say, in place; both end in eval mode.

    Args:
        student: shares its parameters already. Of several processes, the main one's is taken.
        teacher: takes the student's views; not changed. None where no loss looks at one.
        batches: this process's training views from a step on, `recipe.accumulate` batches for each step.
        recipe: losses and optimizer.
        blocks: names of all of the student's blocks, for drop path.
        comparison: which losses there are, and where the two models are read.
        mixing: mixes each batch, for both.
        matrices: names of the blocks' matrices, for the optimizer.
        fade: told of the share of the training that is over, before each step.
        accelerator: decides device, precision and processes.
        ticker: told of every step.
        input_size: (channels, height, width) of a view.
        num_steps: length in steps; None where `seconds` is given.
        seconds: length in time.
        seed: of the tokens that relations are taken of.
        skip_bad_images: count unreadable images instead of stopping.
        checkpoints: where the state is kept, and whence the training goes on where there is one; None for nowhere.
        cache: what the teacher said of these views before; None to ask it each time.
        compiled: compile the student's blocks.

    Returns:
        What happened.

    Raises:
        DivergedError: a loss or gradient that is not finite.
        DataError: an unreadable image, or none that is readable.
        TerminationError: SIGTERM came; the state is kept.
        KeyboardInterrupt: Ctrl-C; the state is kept, unless it came twice.

    Source: weight distillation in MiniViT, arXiv:2204.07154, Sec. 3.3; the logits are soft targets of Hinton et al.
        2015, arXiv:1503.02531.
    """
    student.to(accelerator.device)
    teacher = teacher.to(accelerator.device).eval() if teacher else None
    average = running_mean(student, recipe.ema) if recipe.ema else None
    run = Run(recipe, student, num_steps, seconds, kept=average.module if average else student)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Grad strides do not match")  # of DDP, on depthwise convolutions
        terminated = stack.enter_context(deferring(ctrl_c=checkpoints is not None))
        stack.enter_context(training_student(student, blocks, recipe))
        compute = stack.enter_context(weighted_losses(student, teacher, comparison, recipe, seed, cache))
        stack.enter_context(_training_reached(student, compute, input_size, accelerator))
        stack.enter_context(compiling(student, blocks if compiled else ()))
        model, *updates = accelerator.prepare(student, *optimizers(student, recipe, matrices))
        stack.callback(accelerator.unwrap_model, model, keep_fp32_wrapper=False)
        if checkpoints:
            checkpoints.restore(accelerator, run, average)
        stream, done = iter(batches(run.steps)), run.done()
        parts: list[Batch] = []
        while done < 1 or not run.steps:
            fade(done)
            factor = lr_factor(done, recipe.warmup)
            for optimizer in updates:
                set_lr(optimizer, factor)
            with run.fetching():
                parts = list(itertools.islice(stream, recipe.accumulate))
            if len(parts) < recipe.accumulate:
                break
            if not all(len(part.labels) for part in parts):
                raise DataError(f"Not one image can be read; the last: {parts[-1].bad[-1]}")
            losses = _backward(model, compute, parts, mixing, run.steps, accelerator)
            losses["norm"] = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            due = checkpoints is not None and checkpoints.due(run.steps + 1)
            flags = {"done": run.done(ahead=1), "due": float(due), "stop": float(terminated())}
            agreed = _agree(losses, flags, parts, accelerator, skip_bad_images=skip_bad_images)
            run.record(agreed, lr=recipe.peak_lr * factor)
            for optimizer in updates:
                optimizer.step()
                optimizer.zero_grad()
            if average:
                average.update_parameters(student)
            done = run.done() if num_steps is not None else agreed.done  # exact where it can be: a resumed run's is
            ticker.step(
                done=done, loss=agreed.losses["loss"], images_per_second=run.images_per_second(), waiting=run.waiting()
            )
            accelerator.log({**agreed.losses, "lr": recipe.peak_lr * factor}, step=run.steps)
            if checkpoints and (agreed.due or agreed.stop):
                checkpoints.save(accelerator, run, average)
            if agreed.stop:
                raise pending()
        if checkpoints and checkpoints.worth_it(run, accelerator):  # what follows may be cut short too
            checkpoints.save(accelerator, run, average)
    if average:
        copy_parameters(average.module, student)
    if parts:  # the last update is checked by no later loss
        with torch.inference_mode():
            finite = torch.isfinite(student(parts[-1].images.to(accelerator.device))).all().float()
        run.check_finite(float(mean_of(finite, accelerator)) == 1.0)
    return run.log()


def _backward(
    model: nn.Module, compute: Compute, parts: Sequence[Batch], mixing: Mixing, step: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Add up the gradients of a step's parts, in place; returns the means of its losses in this process."""
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(parts):
        images, labels = (each.to(accelerator.device, non_blocking=True) for each in (batch.images, batch.labels))
        views, targets = mixing(images, labels, step)
        with accelerator.no_sync(model) if number + 1 < len(parts) else nullcontext():
            with accelerator.autocast():
                found = compute(model, views, targets, step, number)
                total = torch.stack(list(found.values())).sum()
            accelerator.backward(total / len(parts))
        for name, value in {"loss": total, **found}.items():
            part = value.detach() / len(parts)
            sums[name] = sums[name] + part if name in sums else part
    return sums


def _agree(
    losses: Mapping[str, Tensor],
    flags: Mapping[str, float],
    parts: Sequence[Batch],
    accelerator: Accelerator,
    *,
    skip_bad_images: bool,
) -> Agreed:
    """Take means over all processes, in one exchange.

    Raises:
        DataError: one of them met an unreadable image, which is not to be skipped.
    """
    bad = [each for batch in parts for each in batch.bad]
    counts = {"images": sum(len(batch.labels) for batch in parts), "skipped": len(bad)}
    names = (*losses, *flags, *counts)
    rest = torch.tensor([*flags.values(), *map(float, counts.values())], device=accelerator.device)
    together = torch.cat([torch.stack([each.float() for each in losses.values()]), rest.float()])
    found = dict(zip(names, mean_of(together, accelerator).tolist(), strict=True))
    images, skipped = (round(found[name] * accelerator.num_processes) for name in counts)
    if skipped and not skip_bad_images:
        first = next(filter(None, gathered(bad, accelerator)))[0]
        raise DataError(f"Unreadable image: {first}", hint="--skip-bad-images goes on without such images.")
    means = {name: found[name] for name in losses if name != "norm"}
    return Agreed(means, found["norm"], found["done"], found["due"] > 0, found["stop"] > 0, images, skipped)


@contextmanager
def _training_reached(
    student: nn.Module, compute: Compute, input_size: tuple[int, int, int], accelerator: Accelerator
) -> Iterator[None]:
    """Leave out of the training, until the context ends, parameters that no loss reaches: DDP would wait for them."""
    left_out: list[nn.Parameter] = []
    if accelerator.num_processes > 1:
        images = torch.zeros(2, *input_size, device=accelerator.device)
        with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
            classes = getattr(student, "num_classes", 0) or 1
            targets = torch.full((2, classes), 1 / classes, device=accelerator.device)
            total = torch.stack(list(compute(student, images, targets, _NO_STEP, 0).values())).sum()
        params = [p for p in student.parameters() if p.requires_grad]
        grads = torch.autograd.grad(total, params, allow_unused=True)
        left_out = [p for p, grad in zip(params, grads, strict=True) if grad is None]
    for p in left_out:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in left_out:
            p.requires_grad_(True)


@contextmanager
def weighted_losses(
    student: nn.Module,
    teacher: nn.Module | None,
    comparison: Matching,
    recipe: DistillRecipe,
    seed: int,
    cache: TeacherCache | None,
) -> Iterator[Compute]:
    """Yield `(model, images, targets, step, part) -> weighted losses by name`, both tapped until the context ends.

    `model` is the student, bare or as accelerate wraps it.

    Args:
        student: bare.
        teacher: in eval mode; not run where no loss looks at it, which it must where it is None.
        comparison: which losses there are, and where the two models are read.
        recipe: temperature, relation heads and tokens.
        seed: of the tokens.
        cache: of the teacher's logits.
    """
    table = {name: LOSSES[name] for name in comparison.losses}
    fields = {loss.reads for loss in table.values()}
    taught = teacher if any(loss.teacher for loss in table.values()) else None
    tokens = TokenSubset(recipe.max_relation_tokens, seed=seed)
    with ExitStack() as stack:
        read_student = stack.enter_context(reading(student, comparison.student, fields, tokens))
        read_teacher = stack.enter_context(reading(taught, comparison.teacher, fields, tokens)) if taught else None

        def ask(images: Tensor, step: int, part: int) -> Outputs:
            if not taught or not read_teacher:
                return Outputs(torch.empty(0))
            if cache is not None and step != _NO_STEP:
                return Outputs(cache.get(step, part, lambda: taught(images)).to(images.device))
            return read_teacher(taught(images))

        def compute(
            model: nn.Module, images: Tensor, targets: Tensor | None, step: int, part: int
        ) -> dict[str, Tensor]:  # fmt: skip
            tokens.draw(max(step, 0))
            with torch.inference_mode():
                target = ask(images, step, part)
            found = read_student(model(images))
            given = Given(recipe.temperature, recipe.relation_heads, targets)
            return {
                name: weight * table[name].compute(found, target, given)
                for name, weight in comparison.losses.items()
            }  # fmt: skip

        yield compute
