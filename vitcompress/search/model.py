"""What a search works on, and what it chooses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from vitcompress.families.registry import family_of
from vitcompress.plans.make import with_sizes_on
from vitcompress.plans.model import Plan
from vitcompress.search.candidates import Candidate
from vitcompress.search.measure import MeasuredOptions, measure_options
from vitcompress.search.options import Shapes
from vitcompress.search.sensitivity import shown_nats

MIN_IMAGES = 32
FITTED_TOKENS = 12_000  # enough for regressions on a few thousand neurons


@dataclass(frozen=True)
class Chosen:
    """The best plan for a target.

    Attributes:
        plan: the chosen plan.
        store: how the file holds its weights.
        tried: the candidates it was chosen from, best first.
        measured: the options and their costs.
    """

    plan: Plan
    store: str
    tried: tuple[Candidate, ...]
    measured: MeasuredOptions

    def reasons(self) -> tuple[str, ...]:
        """Describe the candidates, one line each, best first."""
        return tuple(
            f"{c.name}: {c.plan.size.student_params:,} parameters, "
            + ("" if math.isnan(c.predicted) else f"{shown_nats(c.predicted)} predicted, ")
            + ("not built" if math.isnan(c.cost) else f"{shown_nats(c.cost)} measured")
            for c in self.tried
        )


@dataclass(frozen=True)
class Search:
    """What a search works on.

    Attributes:
        teacher: in eval mode; not changed.
        name: what the user calls the teacher.
        images: for calibration, `[B, C, H, W]`, on the teacher's device; a quarter is held out to
            choose on.
        store: how the file holds the weights; None lets the search choose, where a size is the
            target.
        token_kernel: size of the token convolution.
        transforms: transformations of every block.
        header_bytes: `(plan, store) -> int`; upper bound of what a plan's file holds besides its
            tensors.
        drop: `(student) -> points`; how much worse than the teacher a student is.
        tell: called with the share of the search that is done, 0–1; it never falls, and is 1 at the
            end alone.
        say: called with a line of text now and then.
    """

    teacher: nn.Module
    name: str
    images: Tensor
    store: str | None
    token_kernel: int
    transforms: tuple[str, ...]
    header_bytes: Callable[[Plan, str], int]
    drop: Callable[[nn.Module], float]
    tell: Callable[[float], None]
    say: Callable[[str], None]

    @property
    def blocks(self) -> Sequence[str]:
        """Full names of the teacher's blocks, in order."""
        return family_of(self.teacher, self.name).block_names(self.teacher)

    @property
    def fitted(self) -> Tensor:
        """The images that starts are fitted to."""
        return self.images[: max(1, 3 * len(self.images) // 4)]

    @property
    def held_out(self) -> Tensor:
        """The images on which starts are compared; the fitted one where there is only one."""
        return self.images[len(self.fitted) :] if len(self.images) > 1 else self.images

    @property
    def option_images(self) -> Tensor:
        """The images that options are fitted to."""
        return self.fitted[: max(MIN_IMAGES, math.ceil(FITTED_TOKENS / _min_tokens(self.teacher, self.images)))]

    @cached_property
    def empty(self) -> nn.Module:
        """The teacher without weights, to count bytes; weights would be encoded at each count."""
        return copy.deepcopy(self.teacher).to("meta")

    def measure(self, kinds: Sequence[str], later_work: float = 0.0) -> MeasuredOptions:
        """Measure every option of some kinds.

        Args:
            kinds: of `KINDS`.
            later_work: what the search does afterwards, in options whose measurement takes as long.

        Raises:
            ModelError: the teacher belongs to no known family.
        """
        family = family_of(self.teacher, self.name)
        shapes = Shapes(self.teacher, family, self.blocks, kinds, self.transforms, self.token_kernel)
        return measure_options(
            shapes, self.option_images, self.held_out[:MIN_IMAGES],
            lambda count, total: self.tell(count / (total + later_work)),
        )  # fmt: skip


def _min_tokens(model: nn.Module, images: Tensor) -> int:
    """Tokens per image, of images `[B, C, H, W]`, in the last stage, which has the fewest."""
    info: Any = model.feature_info
    reduction = int(info[-1]["reduction"])
    return max(1, (images.shape[-2] // reduction) * (images.shape[-1] // reduction))


def choose(tried: Sequence[Candidate], search: Search, store: str, measured: MeasuredOptions) -> Chosen:
    """Choose the first of the candidates, and count the bytes that each takes in its store.

    Args:
        tried: built candidates, best first.
        search: what the search works on.
        store: how the file holds the weights, a key of `STORES`.
        measured: the options and their costs.
    """
    stored = tuple(replace(c, plan=with_sizes_on(c.plan, search.empty, store)) for c in tried)
    return Chosen(stored[0].plan, store, stored, measured)
