"""How much longer do a step of distillation, and the student's inference, take than plain timm's?

Each thing is timed in turn with its floor, in one process, so that what else the machine does hits
both; ratios are of the times of each pair. The floor of a step is a training step of the same
architecture in plain timm, with the labels' cross-entropy and AdamW, and one forward pass of the
teacher; that of inference is the teacher's. Weights are random: times do not depend on them, but
for the transformations, which are moved off the identity, since at the identity some of them are
not computed. Peak memory is that of child processes, two steps each, less what Python and its
modules take.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.distill.hooks import TokenSubset, reading_outputs
from vitcompress.distill.losses import LOSSES, LossContext
from vitcompress.distill.matching import ComparedModel, match_models
from vitcompress.distill.optimizers import make_optimizers
from vitcompress.distill.student import compiling, training_student
from vitcompress.families.registry import family_of
from vitcompress.layers.transforms import TRANSFORM_MODULES
from vitcompress.plans.make import make_plan
from vitcompress.recipe import DistillRecipe, PlanRecipe
from vitcompress.surgery import apply_plan

NAMES = {"tiny": "deit_tiny_patch16_224", "small": "deit_small_patch16_224", "swin": "swin_tiny_patch4_window7_224"}
LOSS = {"logits": 1.0, "attention": 1.0, "hidden_relation": 0.1}  # the paper's three, with its weights
LAYERS = "1,3,5,7,9,11"
BOTH = ("heads", "mlp")
STUDENTS: dict[str, dict[str, Any]] = {  # for inference
    "head mixing and token convolution": {"share": 12, "transforms": BOTH},
    "token convolution": {"share": 12, "transforms": ("mlp",)},
    "sharing alone": {"share": 12, "transforms": ()},
    "narrow, half": {"share": 1, "width": 0.5},
    "low rank, a third of the width": {"share": 1, "adapter_rank": 64, "matrices": False},
}
Work = Callable[[], Any]


@dataclass(frozen=True)
class Ratio:
    """Time relative to the floor: median and quartiles over pairs, and the median of CPU time."""

    median: float
    quartiles: tuple[float, float]
    cpu: float

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{self.median:.2f} ({low:.2f}–{high:.2f}) | {self.cpu:.2f}"


def compare_times(ours: Work, floor: Work, pairs: int, least_seconds: float = 0.0) -> Ratio:
    """Time two functions in turn, after one uncounted call of each; which is first alternates."""
    works = (ours, floor)
    took = [_timed(work, 1)[0] for work in works]
    repeats = [max(1, round(least_seconds / max(seconds, 1e-6))) for seconds in took]
    wall: list[float] = []
    cpu: list[float] = []
    for number in range(pairs):
        found = [(0.0, 0.0)] * 2
        for which in (0, 1) if number % 2 else (1, 0):
            found[which] = _timed(works[which], repeats[which])
        wall.append(found[0][0] / found[1][0])
        cpu.append(found[0][1] / found[1][1])
    low, _, high = statistics.quantiles(wall, n=4, method="inclusive")
    return Ratio(statistics.median(wall), (low, high), statistics.median(cpu))


def _timed(work: Work, repeats: int) -> tuple[float, float]:
    """Seconds of one pass: by the clock, and of all threads of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def student_of(teacher: nn.Module, recipe: dict[str, Any]) -> tuple[nn.Module, frozenset[str]]:
    """Return a student with transformations off the identity, and the names of its matrices."""
    plan = make_plan(teacher, PlanRecipe(**recipe), name="teacher")
    student = copy.deepcopy(teacher)
    apply_plan(student, plan)
    for module in student.modules():
        if isinstance(module, TRANSFORM_MODULES):
            with torch.no_grad():
                module.weight.add_(0.05 * torch.randn_like(module.weight))
    return student, frozenset(plan.matrices)


def plain_step(model: nn.Module, images: Tensor) -> Work:
    """A training step of timm's model, alone."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    labels = torch.arange(len(images)) % 1000

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: nn.Module, images: Tensor) -> Work:
    """One forward pass."""
    model = model.eval()

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    return forward


def floor_of_a_step(teacher: nn.Module, images: Tensor) -> Work:
    """What a step of distillation cannot do without."""
    step, forward = plain_step(teacher, images), inference(teacher, images)

    def both() -> None:
        forward()
        step()

    return both


def distilling_step(
    teacher: nn.Module, images: Tensor, transforms: Sequence[str], stack: ExitStack, *, compiled: bool = False
) -> Work:
    """A step as `distill` does it, with the paper's losses on six layers."""
    size = tuple(images.shape[1:])
    recipe = DistillRecipe(loss=LOSS, layers=LAYERS, lr=1e-5)
    student, matrices = student_of(teacher, {"share": 12, "transforms": tuple(transforms)})
    matching = match_models(ComparedModel("student", student, size), ComparedModel("teacher", teacher, size), recipe)  # type: ignore[arg-type]
    teacher.eval()
    tokens = TokenSubset(recipe.max_relation_tokens, seed=0)
    fields = {LOSSES[name].reads for name in matching.losses}
    blocks = family_of(teacher, "teacher").block_names(teacher)
    stack.enter_context(training_student(student, blocks, recipe))
    read_student = stack.enter_context(reading_outputs(student, matching.student, fields, tokens))
    read_teacher = stack.enter_context(reading_outputs(teacher, matching.teacher, fields, tokens))
    stack.enter_context(compiling(student, blocks if compiled else ()))
    updates = make_optimizers(student, recipe, matrices)
    context = LossContext(recipe.temperature, recipe.relation_heads)

    def compute() -> Tensor:
        with torch.inference_mode():
            target = read_teacher(teacher(images))
        found = read_student(student(images))
        losses = [weight * LOSSES[name].compute(found, target, context) for name, weight in matching.losses.items()]
        return torch.stack(losses).sum()

    def step() -> None:
        compute().backward()  # what was read is free before
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for optimizer in updates:
            optimizer.step()
            optimizer.zero_grad()

    return step


def peak_mib(which: str, name: str, batch: int, transforms: Sequence[str]) -> float:
    """Return this process's peak resident memory over two steps; includes the teacher's weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224)
    before = _peak_kib()
    teacher = timm.create_model(name).eval()
    with ExitStack() as stack:
        step = plain_step(teacher, images) if which == "floor" else distilling_step(teacher, images, transforms, stack)
        for _ in range(2):
            step()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> float:
    """Return peak resident memory from /proc; `ru_maxrss` would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0])


def in_a_child(work: Callable[..., float], *args: Any) -> float:
    """What `work` gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def step_rows(name: str, asked: argparse.Namespace) -> list[str]:
    """Steps of distillation against their floor, and steps of students alone against timm's."""
    teacher = timm.create_model(name).eval()
    images = torch.randn(asked.batch, 3, 224, 224)
    rows = []
    for transforms in (BOTH, ("mlp",)):
        with ExitStack() as stack:
            ours = distilling_step(teacher, images, transforms, stack)
            found = compare_times(ours, floor_of_a_step(teacher, images), asked.pairs)
        rows.append(f"| {name} | distillation, transformations {', '.join(transforms)} | {asked.batch} | {found} |")
        gc.collect()
    return rows


def student_rows(name: str, asked: argparse.Namespace) -> list[str]:
    """Steps of students alone, without teacher and relations, against timm's."""
    teacher = timm.create_model(name).eval()
    images = torch.randn(asked.batch, 3, 224, 224)
    rows = []
    for title in list(STUDENTS)[:3]:
        student, _ = student_of(teacher, STUDENTS[title])
        found = compare_times(plain_step(student, images), plain_step(teacher, images), asked.pairs)
        rows.append(f"| {name} | student's step alone, {title} | {asked.batch} | {found} |")
    return rows


def inference_rows(name: str, asked: argparse.Namespace) -> list[str]:
    """Inference of students of each kind against the teacher's."""
    teacher = timm.create_model(name).eval()
    rows = []
    for title, recipe in STUDENTS.items():
        student, _ = student_of(teacher, recipe)
        for batch in (1, 32):
            images = torch.randn(batch, 3, 224, 224)
            works = inference(student, images), inference(teacher, images)
            found = compare_times(*works, asked.pairs, least_seconds=0.2)
            rows.append(f"| {name} | inference, {title} | {batch} | {found} |")
    return rows


def compiled_rows(name: str, asked: argparse.Namespace) -> list[str]:
    """The same through `torch.compile`, against the teacher as it is and compiled."""
    teacher = timm.create_model(name).eval()
    student, _ = student_of(teacher, STUDENTS["head mixing and token convolution"])
    rows = []
    images = torch.randn(asked.batch, 3, 224, 224)
    with ExitStack() as stack:
        steps = [distilling_step(teacher, images, BOTH, stack, compiled=compiled) for compiled in (True, False)]
        found = compare_times(steps[0], steps[1], asked.pairs)
    rows.append(
        f"| {name} | distillation, both transformations, compiled, against not compiled | {asked.batch} | {found} |"
    )
    for batch in (1, 32):
        images = torch.randn(batch, 3, 224, 224)
        compiled: list[Any] = [torch.compile(copy.deepcopy(model)) for model in (student, teacher)]
        for title, other in (("its teacher", teacher), ("its teacher compiled", compiled[1])):
            works = inference(compiled[0], images), inference(other, images)
            found = compare_times(*works, asked.pairs, least_seconds=0.2)
            rows.append(f"| {name} | inference, both transformations, compiled, against {title} | {batch} | {found} |")
    return rows


def memory_rows(name: str, asked: argparse.Namespace) -> list[str]:
    """Peaks of a step and of its floor, each in a child."""
    floor = in_a_child(peak_mib, "floor", name, asked.batch, ())
    rows = []
    for transforms in (BOTH, ("mlp",)):
        peak = in_a_child(peak_mib, "ours", name, asked.batch, transforms)
        title = f"peak memory of distillation, transformations {', '.join(transforms)}"
        rows.append(f"| {name} | {title} | {asked.batch} | {peak / floor:.2f} ({peak:,.0f} of {floor:,.0f} MiB) | |")
    return rows


PARTS = {
    "step": step_rows, "student": student_rows, "inference": inference_rows, "memory": memory_rows,
    "compile": compiled_rows,
}  # fmt: skip


def run(arguments: Sequence[str] = ()) -> str:
    """The table.

    Args:
        arguments: what was typed after the benchmark's name.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks speed")
    parser.add_argument("--models", nargs="+", default=["tiny", "small"], choices=list(NAMES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--batch", type=int, default=32, help="images of a training step")
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs of each row")
    asked = parser.parse_args(list(arguments))
    torch.set_num_threads(asked.threads)
    lines = [
        f"224 px, single precision, {asked.threads} thread(s), {asked.pairs} pairs; torch {torch.__version__}, "
        f"timm {timm.__version__}.",
        "",
        "| model | what | batch | ratio (quartiles) | of CPU time |",
        "|---|---|---:|---:|---:|",
    ]
    for model in asked.models:
        for part in asked.parts:
            torch.manual_seed(0)
            for row in PARTS[part](NAMES[model], asked):
                sys.stderr.write(f"{row}\n")
                lines.append(row)
    return "\n".join(lines)
