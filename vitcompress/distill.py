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
from vitcompress.errors import TrainingError
from vitcompress.losses import LOSSES, Outputs
from vitcompress.recipe import DistillRecipe
from vitcompress.taps import tap_outputs
from vitcompress.transforms import HeadMix, TokenConvolution

_POINTS = 200  # of the loss curve in the report
_SNAPSHOT_STEPS = 50


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
        DataError: an unreadable image.

    Source: weight distillation in MiniViT, arXiv:2204.07154, Sec. 3.3; the logits are soft targets of Hinton et al.
        2015, arXiv:1503.02531.
    """
    optimizer = torch.optim.AdamW(parameter_groups(student, recipe), lr=recipe.lr)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    teacher = teacher.to(accelerator.device).eval()
    model.train()
    run = _Run(recipe, student)
    start = time.perf_counter()
    with tap_outputs(student, blocks) as student_hidden, tap_outputs(teacher, blocks) as teacher_hidden:
        for batch in loader:
            images = _usable(batch, run, skip_bad_images)
            if images is None:
                continue
            elapsed = time.perf_counter() - start
            done = run.steps / num_steps if num_steps else elapsed / seconds if seconds else 1.0
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(done, recipe.warmup)
            with torch.no_grad():
                target = Outputs(teacher(images), list(teacher_hidden))
            found = Outputs(model(images), list(student_hidden))
            losses = {
                name: weight * LOSSES[name](found, target, recipe.temperature)
                for name, weight in recipe.loss.items()
                if weight
            }
            total = torch.stack(list(losses.values())).sum()
            accelerator.backward(total)
            norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            run.record(losses, total, norm, lr=group["lr"], images=len(images), seconds=time.perf_counter() - start)
            optimizer.step()
            optimizer.zero_grad()
            ticker.step(
                done=(run.steps / num_steps) if num_steps else min(1.0, elapsed / (seconds or 1.0)),
                loss=float(total.detach()),
                images_per_second=run.images / (time.perf_counter() - start),
            )
    student.eval()
    return run.log()


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
    """State of one training run: counters, the loss curve, and the last good weights."""

    def __init__(self, recipe: DistillRecipe, student: nn.Module) -> None:
        self.recipe, self.student = recipe, student
        self.steps = self.images = self.skipped = 0
        self.seconds = 0.0
        self.sums: dict[str, float] = {}
        self.since = 0
        self.every = 1
        self.curve: list[dict[str, float]] = []
        self.good = _copy(student)

    def record(
        self, losses: Mapping[str, Tensor], total: Tensor, norm: Tensor, *, lr: float, images: int, seconds: float
    ) -> None:
        """Count a step whose gradients are about to be applied.

        Raises:
            DivergedError: the loss or the gradient is not finite.
        """
        values = {"loss": float(total.detach()), **{name: float(value.detach()) for name, value in losses.items()}}
        if not math.isfinite(values["loss"]) or not math.isfinite(float(norm)):
            self._diverged()
        if self.steps % _SNAPSHOT_STEPS == 0:
            self.good = _copy(self.student)
        self.steps += 1
        self.images += images
        self.seconds = seconds
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.since += 1
        if self.since == self.every:
            self._point(lr)

    def _point(self, lr: float) -> None:
        self.curve.append({"step": self.steps, "lr": lr, **{k: v / self.since for k, v in self.sums.items()}})
        self.sums, self.since = {}, 0
        if len(self.curve) == _POINTS:  # every second point goes, and new ones come half as often
            self.curve, self.every = self.curve[1::2], 2 * self.every

    def _diverged(self) -> None:
        with torch.no_grad():
            for p, value in zip(self.student.parameters(), self.good, strict=True):
                p.copy_(value)
        self.student.eval()
        error = DivergedError(
            f"The loss is not finite at step {self.steps + 1} (--lr {self.recipe.lr:g}).",
            hint=f"Try --lr {self.recipe.lr / 10:g}.",
        )
        error.log = self.log()
        raise error

    def log(self) -> TrainLog:
        """What happened so far."""
        speed = self.images / self.seconds if self.seconds else 0.0
        return TrainLog(
            steps=self.steps,
            images=self.images,
            skipped_images=self.skipped,
            seconds=round(self.seconds, 3),
            images_per_second=round(speed, 1),
            loss_curve=tuple({name: round(value, 6) for name, value in point.items()} for point in self.curve),
        )


def _usable(batch: Batch, run: _Run, skip_bad_images: bool) -> Tensor | None:
    """The batch's images; None where not one could be read."""
    run.skipped += check_readable(batch, skip=skip_bad_images)
    return batch.images if len(batch.labels) else None


def _copy(student: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in student.parameters()]
