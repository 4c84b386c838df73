"""How fast is training, next to a bare loop with the same losses?

The bare loop runs both models, computes the same losses of their outputs, and updates with AdamW;
nothing is logged, kept or checked. Both take the same images from memory, in turn, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.factories import compressed
from vitcompress.data.loaders import Batch
from vitcompress.distill.hooks import TokenSubset, reading_outputs
from vitcompress.distill.loop import distill
from vitcompress.distill.losses import LOSSES, LossContext
from vitcompress.distill.matching import ComparedModel, Matching, match_models
from vitcompress.distill.optimizers import make_optimizers
from vitcompress.distill.settings import TrainSettings
from vitcompress.families.registry import family_of
from vitcompress.plans.model import Plan
from vitcompress.recipe import DistillRecipe, RunRecipe
from vitcompress.runtime.precision import precision_of

WARM_STEPS = 1


class _Times:
    """A ticker that notes the processor seconds at each step."""

    def __init__(self) -> None:
        self.at = [time.process_time()]

    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        self.at.append(time.process_time())

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.at[WARM_STEPS:-1], self.at[WARM_STEPS + 1 :], strict=True)]


def run(arguments: Sequence[str] = ()) -> str:
    """Return a row per width of the students."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks throughput")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--widths", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--batch", type=int, default=32, help="images of a step")
    parser.add_argument("--steps", type=int, default=4, help="that are timed in a round")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(list(arguments))
    precision = precision_of(RunRecipe())
    lines = [
        f"{given.model}, {given.batch} images a step, {precision}; processor seconds.",
        "",
        "| width | losses | images a second | of a bare loop (rounds) |",
        "|---:|---|---:|---:|",
    ]
    teacher = timm.create_model(given.model).eval()
    images = torch.randn(given.batch, *teacher.pretrained_cfg["input_size"])
    for width in given.widths:
        student, plan = compressed(teacher, share=1, width=width)
        size = (images.shape[1], images.shape[2], images.shape[3])
        recipe = DistillRecipe(lr=1e-5)
        models = ComparedModel("student", student, size), ComparedModel("teacher", teacher, size)
        matching = match_models(*models, recipe)
        ours, bare = [], []
        for _ in range(given.rounds):
            ours += _with_the_product(student, teacher, plan, matching, images, given.steps, precision)
            bare += _bare(student, teacher, plan, matching, images, given.steps, precision)
        count = given.steps
        parts = [
            statistics.median(bare[i : i + count]) / statistics.median(ours[i : i + count])
            for i in range(0, len(ours), count)
        ]
        rate = given.batch / statistics.median(ours)
        shown = f"{statistics.median(parts):.3f} ({min(parts):.3f}–{max(parts):.3f})"
        lines.append(f"| {width:g} | {', '.join(matching.losses)} | {rate:.1f} | {shown} |")
    return "\n".join(lines)


def _with_the_product(
    student: nn.Module, teacher: nn.Module, plan: Plan, matching: Matching, images: Tensor, steps: int, precision: str
) -> list[float]:
    """Return the seconds of each step of `distill`."""
    times = _Times()
    settings = TrainSettings(
        DistillRecipe(lr=1e-5), matching, blocks=family_of(student, "student").block_names(student),
        matrices=plan.matrices, input_size=(images.shape[1], images.shape[2], images.shape[3]),
        num_steps=steps + WARM_STEPS,
    )  # fmt: skip

    def batches(start: int) -> Iterator[Batch]:
        for _ in range(steps + WARM_STEPS):
            yield Batch(images, torch.zeros(len(images), dtype=torch.int64), ())

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else "no")
    distill(student, teacher, batches, settings, accelerator=accelerator, ticker=times)
    return times.steps


def _bare(
    student: nn.Module, teacher: nn.Module, plan: Plan, matching: Matching, images: Tensor, steps: int, precision: str
) -> list[float]:
    """Return the seconds of each step of a loop that does no more than it must."""
    recipe, times = DistillRecipe(lr=1e-5), _Times()
    tokens = TokenSubset(recipe.max_relation_tokens, seed=0)
    fields = {LOSSES[name].reads for name in matching.losses}
    context = LossContext(recipe.temperature, recipe.relation_heads)
    [optimizer] = make_optimizers(student, recipe, plan.matrices)
    with ExitStack() as stack:
        read_student = stack.enter_context(reading_outputs(student.train(), matching.student, fields, tokens))
        read_teacher = stack.enter_context(reading_outputs(teacher, matching.teacher, fields, tokens))
        for _ in range(steps + WARM_STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                with torch.inference_mode():
                    target = read_teacher(teacher(images))
                found = read_student(student(images))
                parts = [w * LOSSES[name].compute(found, target, context) for name, w in matching.losses.items()]
                loss = torch.stack(parts).sum()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.step(done=0.0, loss=loss.item(), images_per_second=0.0)
    student.eval()
    return times.steps
