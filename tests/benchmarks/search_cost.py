"""What does the search for a plan cost, in forward passes of its images?

Random weights and random images: what is counted is time. Processor time, so that a busy machine
changes little.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import nn

from tests.search.factories import search_of
from vitcompress.recipe import TargetRecipe
from vitcompress.search.target import search_target

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
STAGES = {
    "token weights": "vitcompress.search.measure.token_weights",
    "alignment": "vitcompress.search.measure.align_group",
    "context": "vitcompress.search.measure.make_context",
    "moments": "vitcompress.search.measure.block_moments",
    "changes": "vitcompress.search.measure._changes",
    "scores": "vitcompress.search.measure.add_scores",
    "choosing": "vitcompress.search.target.find_candidates",
    "building": "vitcompress.search.target.build_best",
}
BATCH_IMAGES = 32


def run(arguments: Sequence[str] = ()) -> str:
    """Return a table of the stages' costs, a row per model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--images", type=int, default=512, help="images to fit and to judge")
    parser.add_argument("--judged", type=int, default=128, help="images to judge, of these")
    parser.add_argument("--ratio", type=float, default=2.0)
    parser.add_argument("--memory", type=float, default=8e9)
    given = parser.parse_args(arguments)
    stages = [*STAGES, "measuring and choosing", "all"]
    lines = [
        "| model | blocks | width | one pass, s | " + " | ".join(stages) + " |",
        "|---|" + "---:|" * (3 + len(stages)),
    ]
    for name in given.models:
        costs, forward = cost_of(timm.create_model(name).eval(), given)
        costs["all"] = sum(costs.values())
        costs["measuring and choosing"] = costs["all"] - costs["building"]
        model: Any = timm.create_model(name)
        cells = [f"{costs[stage] / forward:.2f}" for stage in stages]
        lines.append(
            f"| {name} | {len(model.blocks)} | {model.embed_dim} | {forward:.1f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def cost_of(model: nn.Module, given: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Return the processor seconds of each stage, and of a float32 forward pass of all images."""
    images = torch.randn(given.images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    fitted, judged = images[: -given.judged], images[-given.judged :]
    search = search_of(model, fitted=fitted, judged=judged, memory_bytes=given.memory)
    forward = _seconds(lambda: _pass(model, images))
    costs: dict[str, float] = defaultdict(float)
    with timed_stages(costs):
        search_target(TargetRecipe(target_ratio=given.ratio), search, lambda done: None)
    return costs, (forward + _seconds(lambda: _pass(model, images))) / 2


@torch.no_grad()
def _pass(model: nn.Module, images: torch.Tensor) -> None:
    for chunk in images.split(BATCH_IMAGES):
        model(chunk)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@contextmanager
def timed_stages(costs: dict[str, float]) -> Iterator[None]:
    """Add the processor seconds of each stage to `costs`, by its name, until the context ends."""

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                costs[stage] += time.process_time() - start

        return call

    with ExitStack() as stack:
        for stage, place in STAGES.items():
            module, _, name = place.rpartition(".")
            function = getattr(__import__(module, fromlist=[name]), name)
            stack.enter_context(patch(place, timed(stage, function)))
        yield
