"""What a search works on, and what it chooses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from vitcompress.families.registry import family_of
from vitcompress.initialize.importance import TokenWeights, token_weights
from vitcompress.plans.make import with_sizes_on
from vitcompress.plans.model import Plan
from vitcompress.search.candidates import Candidate
from vitcompress.search.divergence import shown_nats
from vitcompress.search.measure import measure_options
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.moments import CHUNK_IMAGES
from vitcompress.search.options import Shapes
from vitcompress.search.progress import Progress


@dataclass(frozen=True)
class Chosen:
    """The best plan for a target.

    Attributes:
        plan: the chosen plan.
        store: how the file holds its weights.
        tried: the candidates it was chosen from, best first.
        student: the student of the plan as it starts.
    """

    plan: Plan
    store: str
    tried: tuple[Candidate, ...]
    student: nn.Module

    def reasons(self) -> tuple[str, ...]:
        """Describe the candidates, one line each, best first, and how much worse the others are."""
        best, *others = self.tried
        return (_described(best), *(f"{_described(other)}, {_margin(best, other)}" for other in others))


def _described(candidate: Candidate) -> str:
    measured = "not built" if math.isnan(candidate.measured) else f"{shown_nats(candidate.measured)} measured"
    return (
        f"{', '.join(candidate.kinds) or 'unchanged'}: {candidate.plan.size.student_params:,} parameters, "
        f"{shown_nats(candidate.predicted)} predicted, {measured}"
    )


def _margin(best: Candidate, other: Candidate) -> str:
    difference = other.predicted - best.predicted if math.isnan(other.measured) else other.measured - best.measured
    return f"{shown_nats(abs(difference))} {'worse' if difference >= 0 else 'better'}"


@dataclass(frozen=True)
class Search:
    """What a search works on.

    Attributes:
        teacher: in eval mode; not changed.
        name: what the user calls the teacher.
        fitted: images that starts are fitted to, `[B, C, H, W]`, on the teacher's device.
        judged: other images, on which options and starts are compared.
        store: how the file holds the weights; None lets the search choose, where a size is the
            target.
        token_kernel: size of the token convolution.
        transforms: transformations of every block.
        multiple: widths of heads and ranks are multiples of it; numbers of neurons of twice it.
        memory_bytes: memory for what is measured.
        header_bytes: `(plan, store) -> int`; upper bound of what a plan's file holds besides its
            tensors.
        drop: `(student) -> points`; how much worse than the teacher a student is.
        say: called with a line of text now and then.
    """

    teacher: nn.Module
    name: str
    fitted: Tensor
    judged: Tensor
    store: str | None
    token_kernel: int
    transforms: tuple[str, ...]
    multiple: int
    memory_bytes: float
    header_bytes: Callable[[Plan, str], int]
    drop: Callable[[nn.Module], float]
    say: Callable[[str], None]

    @property
    def blocks(self) -> Sequence[str]:
        """Full names of the teacher's blocks, in order."""
        return family_of(self.teacher, self.name).block_names(self.teacher)

    @cached_property
    def empty(self) -> nn.Module:
        """The teacher without weights, to count bytes; weights would be encoded at each count."""
        return copy.deepcopy(self.teacher).to("meta")

    @cached_property
    def weights(self) -> TokenWeights:
        """How much each token counts in fits; the same for every student that is built."""
        family = family_of(self.teacher, self.name)
        return token_weights(self.teacher, family, self.blocks, self.fitted.split(CHUNK_IMAGES))

    def shapes(self, kinds: Sequence[str]) -> Shapes:
        """Return what options and plans depend on.

        Args:
            kinds: of `KINDS`.

        Raises:
            ModelError: the teacher belongs to no known family.
        """
        family = family_of(self.teacher, self.name)
        return Shapes(self.teacher, family, self.blocks, kinds, self.transforms, self.token_kernel, self.multiple)

    def measure(
        self, kinds: Sequence[str], tell: Callable[[float], None], keep: Progress | None = None
    ) -> MeasuredOptions:
        """Measure every option of some kinds, and say which are left out for want of memory.

        Args:
            kinds: of `KINDS`.
            tell: called with the share that is done, 0–1.
            keep: keeps the state where the measurement is interrupted, and goes on from it.

        Raises:
            ModelError: the teacher belongs to no known family.
        """
        measured = measure_options(self.shapes(kinds), self.fitted, self.judged, self.memory_bytes, tell, keep)
        if measured.num_left_out:
            self.say(
                f"{measured.num_left_out:,} ways of sharing are left out: what they need does not fit in "
                f"{self.memory_bytes / 1e9:.3g} GB at once. Give more with --max-memory."
            )
        return measured


def choose(tried: Sequence[Candidate], student: nn.Module, search: Search, store: str) -> Chosen:
    """Choose the first of the candidates, and count the bytes that each takes in its store.

    Args:
        tried: candidates, best first; the first is built.
        student: of the first candidate.
        search: what the search works on.
        store: how the file holds the weights, a key of `STORES`.
    """
    stored = tuple(replace(c, plan=with_sizes_on(c.plan, search.empty, store)) for c in tried)
    return Chosen(stored[0].plan, store, stored, student)
