"""How is a plan searched for, on a teacher with its weights and images?  What the search needs, gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vitcompress.data import ImageSet
from vitcompress.data.calibration import calibration_batches, drawn
from vitcompress.data.views import evaluation_loader
from vitcompress.measure.accuracy import evaluate_pair
from vitcompress.plans.model import Plan
from vitcompress.recipe import Recipe
from vitcompress.runtime.console import Reporter
from vitcompress.search.measure import Measured
from vitcompress.search.model import Chosen, Search
from vitcompress.search.target import reach

JUDGED_IMAGES = 1000


@dataclass(frozen=True)
class Planning:
    """What a plan is searched for with.

    Attributes:
        teacher: in eval mode, on the device to search on.
        name: what the user called it.
        recipe: target, kinds, transformations, store, number of calibration images and seed.
        images: the training images.
        config: timm's data config.
        reporter: told how it goes.
        header_bytes: `(plan, store) -> int`; what a file of the plan has beside its tensors, at most.
    """

    teacher: nn.Module
    name: str
    recipe: Recipe
    images: ImageSet
    config: Mapping[str, Any]
    reporter: Reporter
    header_bytes: Callable[[Plan, str], int]

    def find(self) -> Chosen:
        """Find the best plan for the recipe's target.

        Raises:
            PlanError: it is out of reach, with what is not.
        """
        with self._search() as search:
            found = reach(self.recipe.target, search)
        return replace(found, plan=replace(found.plan, why=found.reasons()))

    def measure(self) -> Measured:
        """Measure what every option costs."""
        with self._search() as search:
            return search.measure(self.recipe.target.kinds)

    @contextmanager
    def _search(self) -> Iterator[Search]:
        device = next(self.teacher.parameters()).device
        count, seed = self.recipe.start.calibration_images, self.recipe.run.seed
        chosen = drawn(self.images, count, seed=seed)
        batches = list(calibration_batches(chosen, self.config, self.recipe.data))
        with self.reporter.counting("measuring options") as tell:
            yield Search(
                teacher=self.teacher,
                name=self.name,
                images=torch.cat(batches).to(device),
                store=self.recipe.store.store,
                token_kernel=self.recipe.plan.token_kernel,
                transforms=self.recipe.plan.transforms or (),
                header_bytes=self.header_bytes,
                drop=self._drop,
                tell=tell,
                say=self.reporter.say,
            )

    def _drop(self, student: nn.Module) -> float:
        """Points of top-1 that a student loses on training images other than those it was fitted to.

        Without labels, the share of images on which it says something else than the teacher, which is no less.
        """
        count = self.recipe.start.calibration_images
        judged = drawn(self.images, JUDGED_IMAGES, seed=self.recipe.run.seed, after=count)
        judged = judged if len(judged) else drawn(self.images, JUDGED_IMAGES, seed=self.recipe.run.seed)
        loader = evaluation_loader(judged, self.config, self.recipe.data)
        device = next(self.teacher.parameters()).device
        found = evaluate_pair(
            student, self.teacher, loader, name=judged.name, device=device,
            skip_bad_images=self.recipe.data.skip_bad_images,
        )  # fmt: skip
        if found.top1_drop is not None:
            return found.top1_drop
        assert found.agreement is not None  # there is a teacher, and it has classes
        return 100 - found.agreement
