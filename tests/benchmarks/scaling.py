"""What GPU hours and memory does a full run of each recipe take, and what is its bottleneck?

Counted: operations and bytes of one training step of each recipe, with its own losses and teacher,
on meta tensors, so without weights and images. Measured: how many images a core makes views of.
Assumed: what a GPU and its links give, see the constants; for another GPU the hours scale with
its rate.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.relation_memory import PeakBytes
from vitcompress.data.classes import ModelClasses
from vitcompress.data.loaders import training_loader
from vitcompress.data.open import open_to_evaluate
from vitcompress.distill.objective import weighted_losses
from vitcompress.distill.settings import TrainSettings
from vitcompress.distill.student import training_student
from vitcompress.errors import Faults, RecipeError
from vitcompress.families.registry import family_named
from vitcompress.pipeline import plan as pipeline
from vitcompress.pipeline.prepare import resolve_recipe
from vitcompress.recipe import DataRecipe, Recipe, compose
from vitcompress.surgery import apply_plan

RECIPES = (
    "mini-deit-ti", "mini-deit-s", "mini-deit-b", "mini-swin-t", "mini-swin-s", "mini-swin-b", "mini-deit-b-posthoc",
    "mini-deit-b-single-posthoc", "mini-swin-b-posthoc",
)  # fmt: skip
IMAGENET = 1_281_167
PEAK_FLOPS, UTILISATION = 312e12, 0.35  # of an A100 in bf16, and what training a ViT gets of it
LINK = {8: 200e9, 64: 20e9}  # bytes per second and GPU: NVLink in one machine; eight machines with 8 x 200 Gb/s
BATCHES = (2, 4)  # of which the cost of an image is the difference


@dataclass(frozen=True)
class Step:
    """What one training step costs.

    Attributes:
        image_flops: of one image: student forwards and backwards, teacher forwards, losses.
        image_bytes: that one image keeps alive till the backward pass is over, in fp32.
        fixed_bytes: weights of both, gradients, and AdamW's two moments of what the student has.
        gradient_bytes: to be exchanged.
        whole_bytes: of gradients, if nothing were shared.
    """

    image_flops: float
    image_bytes: float
    fixed_bytes: int
    gradient_bytes: int
    whole_bytes: int


def num_bytes(model: nn.Module) -> int:
    """Of the parameters, each shared one once, in fp32."""
    return sum(4 * p.numel() for p in model.parameters())


def step_of(recipe: Recipe) -> Step:
    """Count a step on meta tensors."""
    faults = Faults()
    resolved: Any = resolve_recipe(recipe, faults)
    faults.raise_as(RecipeError)
    student = copy.deepcopy(resolved.model)
    apply_plan(student, resolved.plan)
    teacher = resolved.teacher.model if resolved.teacher else resolved.model
    blocks = family_named(resolved.plan.family).block_names(student)
    settings = TrainSettings(
        recipe.distill, replace(resolved.matching, image_size=None), blocks=blocks, matrices=(),
        input_size=resolved.config["input_size"], num_steps=1,
    )  # fmt: skip
    flops, peaks = [], []
    with (
        training_student(student, blocks, replace(recipe.distill, drop_path=0.0)),
        weighted_losses(student, teacher.eval(), settings) as compute,
        sdpa_kernel(SDPBackend.MATH),  # the only kernel with a formula; fused ones keep less, so this is a bound
    ):
        for batch in BATCHES:
            images = torch.zeros(batch, *resolved.config["input_size"], device="meta")
            targets = torch.zeros(batch, int(student.num_classes), device="meta")
            for counter in (FlopCounterMode(display=False), PeakBytes()):
                with counter:
                    losses: list[Tensor] = list(compute(student, images, targets, 0).values())
                    torch.stack(losses).sum().backward()
                if isinstance(counter, PeakBytes):
                    peaks.append(counter.peak)
                else:
                    flops.append(counter.get_total_flops())
                student.zero_grad()
    more = BATCHES[1] - BATCHES[0]
    return Step(
        (flops[1] - flops[0]) / more,
        (peaks[1] - peaks[0]) / more,
        4 * num_bytes(student) + num_bytes(teacher),
        num_bytes(student),
        num_bytes(resolved.model),
    )


def images_per_core(recipe: Recipe) -> float:
    """Return the views per second of one core, from images of average size (500 × 375)."""
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        for number in range(64):
            noise = Image.fromarray(draw.integers(0, 256, (75, 100, 3), dtype=np.uint8)).resize((500, 375))
            noise.filter(ImageFilter.GaussianBlur(1)).save(Path(folder) / f"{number}.jpg", quality=90)
        images = open_to_evaluate(folder, "--data", DataRecipe(), None, ModelClasses(None))
        assert images is not None
        config = {
            "input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3,
            "crop_pct": 0.9, "crop_mode": "center",
        }  # fmt: skip
        data = replace(recipe.data, batch_size=32, num_workers=0, mixup=0.0, cutmix=0.0)
        rates, last = [], time.process_time()
        for batch in training_loader(images, config, data, seed=0, num_steps=8):
            now = time.process_time()
            rates.append(len(batch.images) / (now - last))
            last = now
    return statistics.median(rates[1:])


def run() -> str:
    """The tables."""
    torch.set_num_threads(1)
    hours = ["| recipe | epochs | TFLOP per image | 1 GPU | 8 GPUs | 64 GPUs |", "|---|---:|---:|---:|---:|---:|"]
    waits = [
        "| recipe | GB fixed | MB per image | images per second and GPU | cores per GPU for images | gradients "
        "| unshared | exchange, 8 GPUs | 64 GPUs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    cores: dict[str, float] = {}
    for name in RECIPES:
        recipe = compose.build({}, file=Path(name), family_name=pipeline.family_name)
        step, epochs, batch = step_of(recipe), recipe.distill.epochs or 0.0, recipe.data.step_images
        views = str((recipe.data.auto_augment, recipe.data.erase))
        cores[views] = cores.get(views) or images_per_core(recipe)
        rate = UTILISATION * PEAK_FLOPS / step.image_flops
        alone = epochs * IMAGENET / rate / 3600
        # exchanged during the backward pass, two thirds of the step; the rest is waiting time
        exchange = {n: 2 * (n - 1) / n * step.gradient_bytes / link for n, link in LINK.items()}
        compute = {n: batch / n / rate for n in (1, 8, 64)}
        waited = {n: max(0.0, exchange.get(n, 0.0) - 2 / 3 * compute[n]) for n in compute}
        total = {n: alone / n * (compute[n] + waited[n]) / compute[n] for n in compute}
        hours.append(
            f"| {name} | {epochs:g} | {step.image_flops / 1e12:.3f} | "
            + " | ".join(f"{total[n]:,.1f} h" for n in (1, 8, 64))
            + " |"
        )
        waits.append(
            f"| {name} | {step.fixed_bytes / 1e9:.2f} | {step.image_bytes / 1e6:,.0f} | {rate:,.0f} | "
            f"{rate / cores[views]:.0f} | {step.gradient_bytes / 1e6:,.0f} MB | {step.whole_bytes / 1e6:,.0f} MB | "
            + " | ".join(f"{1e3 * exchange[n]:.1f} of {1e3 * compute[n]:.0f} ms" for n in (8, 64))
            + " |"
        )
    measured = "; ".join(f"{rate:.0f} a second with policy, erasing = {views}" for views, rate in cores.items())
    return "\n".join([*hours, "", *waits, "", f"Views made by one core here: {measured}."])
