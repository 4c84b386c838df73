"""How does the student learn from the teacher?  One training loop, on accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitcompress.console import Ticker
from vitcompress.data import Batch, check_readable
from vitcompress.errors import DataError, TrainingError
from vitcompress.losses import LOSSES, Outputs
from vitcompress.recipe import DistillRecipe
from vitcompress.taps import tap_outputs
from vitcompress.transforms import HeadMix, TokenConvolution

_POINTS = 200  # of the loss curve in the report
_SNAPSHOT_STEPS = 50
_BAD_IN_A_ROW = 1000


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainLog:
    """What training did.

    Attributes:
        steps: optimizer steps taken.
        images: views seen, counted each time.
        skipped_images: unreadable ones met, counted each time.
        seconds: of the loop, without loading and evaluation.
        images_per_second: over the whole loop.
        loss_curve: at most 200 points, each `{step, lr, loss, <loss name>…}`; a point is a mean since the one before.
    """

    steps: int = 0
    images: int = 0
    skipped_images: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    loss_curve: tuple[dict[str, float], ...] = field(default_factory=tuple)


class DivergedError(TrainingError):
    """The loss became infinite or undefined; the student holds its last good state.

    Attributes:
        log: the training up to there.
    """

    log: TrainLog


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: DataLoader[Any],
    recipe: DistillRecipe,
    *,
    blocks: Sequence[str],
    accelerator: Accelerator,
    ticker: Ticker,
    num_steps: int | None,
    seconds: float | None = None,
    skip_bad_images: bool = False,
) -> TrainLog:
    """Train `student` to do what `teacher` does, in place; both end in eval mode.

    Args:
        student: shares its parameters already.
        teacher: same inputs; not changed.
        loader: batches of training views, `num_steps` of them or endless.
        recipe: losses and optimizer.
        blocks: names of the blocks whose outputs the hidden loss compares.
        accelerator: decides device and processes.
        ticker: told of every step.
        num_steps: length in steps; None where `seconds` is given.
        seconds: length in time.
        skip_bad_images: count unreadable images instead of stopping.

    Returns:
        What happened.

    Raises:
        DivergedError: a loss or gradient that is not finite.
        DataError: an unreadable image, or none that is readable.

    Source: weight distillation in MiniViT, arXiv:2204.07154, Sec. 3.3; the logits are soft targets of Hinton et al.
        2015, arXiv:1503.02531.
    """
    optimizer = torch.optim.AdamW(parameter_groups(student, recipe), lr=recipe.lr)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    teacher = teacher.to(accelerator.device).eval()
    model.train()
    run = _Run(recipe, student, num_steps, seconds)
    with tap_outputs(student, blocks) as student_hidden, tap_outputs(teacher, blocks) as teacher_hidden:
        for batch in loader:
            done = run.done()
            if done >= 1:
                break
            run.count_bad(batch, skip=skip_bad_images)
            if len(batch.labels) == 0:
                continue
            lr = recipe.lr * lr_factor(done, recipe.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.no_grad():
                target = Outputs(teacher(batch.images), list(teacher_hidden))
            found = Outputs(model(batch.images), list(student_hidden))
            losses = weigh(found, target, recipe)
            total = torch.stack(list(losses.values())).sum()
            accelerator.backward(total)
            norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            run.record({"loss": total, **losses}, norm, lr=lr, images=len(batch.images))
            optimizer.step()
            optimizer.zero_grad()
            ticker.step(done=run.done(), loss=float(total.detach()), images_per_second=run.images_per_second())
    student.eval()
    if run.steps:
        with torch.inference_mode():
            run.check_finite(student(batch.images))  # the last update is checked by no later loss
    return run.log()


def weigh(student: Outputs, teacher: Outputs, recipe: DistillRecipe) -> dict[str, Tensor]:
    """Every loss of the recipe, times its weight; those of weight zero are not computed."""
    return {
        name: weight * LOSSES[name](student, teacher, recipe.temperature)
        for name, weight in recipe.loss.items()
        if weight
    }


def parameter_groups(student: nn.Module, recipe: DistillRecipe) -> list[dict[str, Any]]:
    """Split the parameters in those with and without weight decay; each shared one comes once.

    Vectors, embeddings that timm exempts, and transformations have none: decay pulls towards zero, and a head mix of
    zero is no identity.

    Args:
        student: any model.
        recipe: the weight decay.
    """
    exempt = set(student.no_weight_decay()) if hasattr(student, "no_weight_decay") else set()  # type: ignore[operator]
    kept = {
        id(p)
        for module in student.modules()
        if isinstance(module, (HeadMix, TokenConvolution))
        for p in module.parameters()
    }
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in student.named_parameters():
        (plain if p.ndim <= 1 or name in exempt or id(p) in kept else decay).append(p)
    return [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def lr_factor(done: float, warmup: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine.

    Args:
        done: share of the training that is over, 0–1.
        warmup: share spent warming up.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


class _Run:
    """State of one training run: its length, counters, the loss curve, and the last good weights."""

    def __init__(self, recipe: DistillRecipe, student: nn.Module, num_steps: int | None, seconds: float | None) -> None:
        self.recipe, self.student, self.num_steps, self.limit = recipe, student, num_steps, seconds
        self.start = time.perf_counter()
        self.steps = self.images = self.skipped = 0
        self.sums: dict[str, float] = {}
        self.since, self.every = 0, 1
        self.curve: list[dict[str, float]] = []
        self.good = _copy(student)

    def done(self) -> float:
        """Share of the training that is over, 0–1."""
        if self.num_steps is not None:
            return self.steps / self.num_steps
        return min(1.0, self.seconds() / self.limit) if self.limit else 1.0

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def images_per_second(self) -> float:
        return self.images / self.seconds()

    def count_bad(self, batch: Batch, *, skip: bool) -> None:
        """Count unreadable images, or stop at them."""
        self.skipped += check_readable(batch, skip=skip)
        if self.images == 0 and self.skipped >= _BAD_IN_A_ROW:
            raise DataError(f"The first {self.skipped:,} training images cannot be read; the last: {batch.bad[-1]}")

    def record(self, losses: Mapping[str, Tensor], norm: Tensor, *, lr: float, images: int) -> None:
        """Count a step whose gradients are about to be applied.

        Raises:
            DivergedError: the loss or the gradient is not finite.
        """
        self.check_finite(torch.stack([losses["loss"].detach(), norm.detach()]))
        if self.steps % _SNAPSHOT_STEPS == 0:
            self.good = _copy(self.student)
        self.steps += 1
        self.images += images
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.since += 1
        if self.since == self.every:
            self._point(lr)

    def _point(self, lr: float) -> None:
        self.curve.append({"step": self.steps, "lr": lr, **{k: v / self.since for k, v in self.sums.items()}})
        self.sums, self.since = {}, 0
        if len(self.curve) == _POINTS:  # every second point goes, and new ones come half as often
            self.curve, self.every = self.curve[1::2], 2 * self.every

    def check_finite(self, values: Tensor) -> None:
        """Restore the last good weights and stop, unless every value is finite."""
        if bool(torch.isfinite(values).all()):
            return
        with torch.no_grad():
            for p, value in zip(self.student.parameters(), self.good, strict=True):
                p.copy_(value)
        self.student.eval()
        error = DivergedError(
            f"The training is not finite after step {self.steps} (--lr {self.recipe.lr:g}).",
            hint=f"Try --lr {self.recipe.lr / 10:g}.",
        )
        error.log = self.log()
        raise error

    def log(self) -> TrainLog:
        """What happened so far."""
        return TrainLog(
            steps=self.steps,
            images=self.images,
            skipped_images=self.skipped,
            seconds=round(self.seconds(), 3),
            images_per_second=round(self.images_per_second(), 1),
            loss_curve=tuple({name: round(value, 6) for name, value in point.items()} for point in self.curve),
        )


def _copy(student: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in student.parameters()]
