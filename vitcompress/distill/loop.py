"""Train the student to reproduce its teacher: one loop, on accelerate."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vitcompress.data.loaders import Batch
from vitcompress.distill.log import QUARTERS, TrainLog
from vitcompress.distill.objective import Objective, weighted_losses
from vitcompress.distill.optimizers import lr_factor, make_optimizers, running_mean, set_lr
from vitcompress.distill.settings import TrainSettings
from vitcompress.distill.small_views import Resize, small_views_first
from vitcompress.distill.state import StepResult, TrainState, set_parameters
from vitcompress.distill.student import compiling, training_student
from vitcompress.errors import DataError
from vitcompress.runtime.console import Ticker
from vitcompress.runtime.processes import from_main, gathered, mean_of
from vitcompress.runtime.signals import deferring, pending


@dataclass(frozen=True)
class _Trainer:
    """What takes a training's steps.

    Attributes:
        student: not wrapped.
        model: the student as accelerate wraps it.
        optimizers: of the model, as accelerate wraps them.
        objective: computes the weighted losses of a batch.
        state: counters, curves and last good weights.
        average: running mean of the student; None without one.
        resize: `(images, share of the training that is over) -> images` in the size to train on.
        settings: of the training.
        accelerator: decides device, precision and processes.
        terminated: tells whether SIGTERM or Ctrl-C came.
    """

    student: nn.Module
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    objective: Objective
    state: TrainState
    average: AveragedModel | None
    resize: Resize
    settings: TrainSettings
    accelerator: Accelerator
    terminated: Callable[[], bool]


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Callable[[int], Iterable[Batch]],
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    ticker: Ticker,
) -> TrainLog:
    """Train `student`, in place, on the outputs of `teacher` or on labels; both end in eval mode.

    Args:
        student: its parameters are shared already. With several processes, the main one's is used.
        teacher: takes the student's views; not changed. None if no loss needs one.
        batches: yields this process's training views from a given step on, `recipe.accumulate`
            batches per step.
        settings: losses, length and everything else that decides the training.
        accelerator: decides device, precision and processes.
        ticker: shows every step.

    Returns:
        Counters and curves of the training.

    Raises:
        DivergedError: a loss or gradient is not finite.
        DataError: an image is unreadable, or all of a batch are.
        TerminationError: SIGTERM came; the state is kept.
        KeyboardInterrupt: Ctrl-C was pressed; the state is kept, unless it was pressed twice.

    Source: weight distillation in MiniViT, arXiv:2204.07154, Sec. 3.3; the logits are soft targets
        of Hinton et al. 2015, arXiv:1503.02531.
    """
    checkpoints = settings.checkpoints
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Grad strides do not match")  # from DDP, for depthwise convolutions
        terminated = stack.enter_context(deferring(ctrl_c=checkpoints is not None))
        trainer = stack.enter_context(_preparing(student, teacher, settings, accelerator, terminated))
        state, average = trainer.state, trainer.average
        if checkpoints:
            checkpoints.restore(accelerator, state, average)
        last_batches = _take_steps(trainer, batches(state.steps), ticker)
        _watch(trainer, 1.0)
        if checkpoints and checkpoints.worth_it(state, accelerator):  # evaluation may be interrupted too
            checkpoints.save(accelerator, state, average)
    if average:
        set_parameters(student, average.module.parameters())
    if last_batches:  # no later loss checks the last update
        with torch.inference_mode():
            finite = torch.isfinite(student(last_batches[-1].images.to(accelerator.device))).all().float()
        state.check_finite(float(mean_of(finite, accelerator)) == 1.0)
    return state.log()


@contextmanager
def _preparing(
    student: nn.Module,
    teacher: nn.Module | None,
    settings: TrainSettings,
    accelerator: Accelerator,
    terminated: Callable[[], bool],
) -> Iterator[_Trainer]:
    """Prepare student and teacher for training, in place, until the context ends."""
    recipe, blocks = settings.recipe, settings.blocks
    student.to(accelerator.device)
    teacher = teacher.to(accelerator.device).eval() if teacher else None
    average = running_mean(student, recipe.ema) if recipe.ema else None
    state = TrainState(
        student, average.module if average else student,
        lr=recipe.peak_lr, num_steps=settings.num_steps, seconds=settings.seconds,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(training_student(student, blocks, recipe))
        objective = stack.enter_context(weighted_losses(student, teacher, settings))
        stack.enter_context(_freezing_unused(student, objective, settings.input_size, accelerator))
        stack.enter_context(compiling(student, blocks if settings.compiled else ()))
        resize = stack.enter_context(small_views_first(student, teacher, recipe.small_first))
        model, *optimizers = accelerator.prepare(student, *make_optimizers(student, recipe, settings.matrices))
        stack.callback(accelerator.unwrap_model, model, keep_fp32_wrapper=False)
        yield _Trainer(student, model, optimizers, objective, state, average, resize, settings, accelerator, terminated)


def _take_steps(trainer: _Trainer, batches: Iterable[Batch], ticker: Ticker) -> list[Batch]:
    """Train until the length of the settings is reached or the batches end.

    Returns:
        The last batches that were loaded.

    Raises:
        DivergedError, DataError, TerminationError, KeyboardInterrupt: as `distill`.
    """
    state, settings, accelerator = trainer.state, trainer.settings, trainer.accelerator
    stream, done = iter(batches), from_main(state.done(), accelerator)  # clocks differ, where it is counted in time
    parts: list[Batch] = []
    while done < 1 or not state.steps:
        _watch(trainer, done)
        settings.before_step(done)
        factor = lr_factor(done, settings.recipe.warmup)
        for optimizer in trainer.optimizers:
            set_lr(optimizer, factor)
        with state.fetching():
            parts = list(itertools.islice(stream, settings.recipe.accumulate))
        if len(parts) < settings.recipe.accumulate:
            break
        if not all(len(part.labels) for part in parts):
            raise DataError(f"No image of a batch can be read; the last one: {parts[-1].bad[-1]}")
        lr = settings.recipe.peak_lr * factor
        result = _take_step(trainer, parts, done, lr)
        done = state.done() if settings.num_steps is not None else result.done  # exact if counted in steps
        ticker.step(
            done=done,
            loss=result.losses["loss"],
            images_per_second=state.images_per_second(),
            waiting=state.waiting(),
        )
        accelerator.log({**result.losses, "lr": lr}, step=state.steps)
        if settings.checkpoints and (result.due or result.stop):
            settings.checkpoints.save(accelerator, state, trainer.average)
        if result.stop:
            raise pending()
    return parts


def _watch(trainer: _Trainer, done: float) -> None:
    """Measure the student, if it is time to, without a change of any random number that follows.

    Raises:
        DivergedError: its outputs are not finite.
    """
    state, device = trainer.state, trainer.accelerator.device
    if trainer.settings.watch is None or done < state.quarters / QUARTERS:
        return
    with state.measuring(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        point = trainer.settings.watch(state.steps, state.kept)
    state.check_finite(all(map(math.isfinite, point.values())))
    state.quarters = int(done * QUARTERS) + 1
    if point:
        state.accuracy.append({"step": state.steps, **point})


def _take_step(trainer: _Trainer, parts: Sequence[Batch], done: float, lr: float) -> StepResult:
    """Update the student once, in place.

    Args:
        trainer: its optimizers have their learning rates.
        parts: batches whose gradients are added up.
        done: share of the training that is over.
        lr: learning rate of AdamW, for the loss curve.

    Raises:
        DataError: a process met an unreadable image, and `skip_bad_images` is off.
        DivergedError: a loss or gradient is not finite.
    """
    state, settings, accelerator = trainer.state, trainer.settings, trainer.accelerator
    losses = _backward(trainer, parts, done)
    norm = accelerator.clip_grad_norm_(trainer.model.parameters(), settings.recipe.clip_norm)
    due = settings.checkpoints is not None and settings.checkpoints.due(state.steps + 1)
    bad = [message for batch in parts for message in batch.bad]
    numbers = {
        "done": state.done(ahead=1), "due": float(due), "stop": float(trainer.terminated()),
        "images": float(sum(len(batch.labels) for batch in parts)), "skipped": float(len(bad)),
    }  # fmt: skip
    means = _means({**losses, "norm": norm}, numbers, accelerator)
    images, skipped = (round(means[name] * accelerator.num_processes) for name in ("images", "skipped"))
    if skipped and not settings.skip_bad_images:
        message = next(filter(None, gathered(bad, accelerator)))[0]
        raise DataError(f"Unreadable image: {message}", hint="--skip-bad-images continues without such images.")
    mean_losses = {name: means[name] for name in losses}
    result = StepResult(mean_losses, means["norm"], means["done"], means["due"] > 0, means["stop"] > 0, images, skipped)
    state.record(result, lr=lr)
    for optimizer in trainer.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if trainer.average:
        trainer.average.update_parameters(trainer.student)
    return result


def _backward(trainer: _Trainer, parts: Sequence[Batch], done: float) -> dict[str, Tensor]:
    """Accumulate the gradients of a step, in place; return this process's mean losses."""
    mixing = trainer.settings.mixing
    accelerator, step = trainer.accelerator, trainer.state.steps
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(parts):
        images, labels = (tensor.to(accelerator.device, non_blocking=True) for tensor in (batch.images, batch.labels))
        views, targets = mixing(images, labels, step)
        views = trainer.resize(views, done)
        with accelerator.no_sync(trainer.model) if number + 1 < len(parts) else nullcontext():
            with accelerator.autocast():
                losses = trainer.objective(trainer.model, views, targets, step)
                total = torch.stack(list(losses.values())).sum()
            accelerator.backward(total / len(parts))
        for name, value in {"loss": total, **losses}.items():
            part = value.detach() / len(parts)
            sums[name] = sums[name] + part if name in sums else part
    return sums


def _means(
    losses: Mapping[str, Tensor], numbers: Mapping[str, float], accelerator: Accelerator
) -> dict[str, float]:  # fmt: skip
    """Return the means of losses and other numbers over all processes, in one exchange."""
    tensors = torch.stack([loss.float() for loss in losses.values()])
    packed = torch.cat([tensors, torch.tensor(list(numbers.values()), device=accelerator.device).float()])
    return dict(zip((*losses, *numbers), mean_of(packed, accelerator).tolist(), strict=True))


@contextmanager
def _freezing_unused(
    student: nn.Module, objective: Objective, input_size: tuple[int, int, int], accelerator: Accelerator
) -> Iterator[None]:
    """Freeze parameters without a gradient, which DDP would wait for, until the context ends."""
    unused: list[nn.Parameter] = []
    if accelerator.num_processes > 1:
        images = torch.zeros(2, *input_size, device=accelerator.device)
        with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
            classes = getattr(student, "num_classes", 0) or 1
            targets = torch.full((2, classes), 1 / classes, device=accelerator.device)
            total = torch.stack(list(objective(student, images, targets, 0).values())).sum()
        params = [p for p in student.parameters() if p.requires_grad]
        grads = torch.autograd.grad(total, params, allow_unused=True)
        unused = [p for p, grad in zip(params, grads, strict=True) if grad is None]
    for p in unused:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in unused:
            p.requires_grad_(True)
