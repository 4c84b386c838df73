"""How is a target reached?  A ratio or a size is a budget to search within; a drop is a budget to look for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from vitcompress.errors import PlanError
from vitcompress.families.find import family_of
from vitcompress.plans.make import measured_on, plan_of
from vitcompress.plans.model import Group, Plan
from vitcompress.quantize.codecs import STORES, num_bytes
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.recipe import TargetRecipe
from vitcompress.search.candidates import (
    Candidate,
    Measured,
    build,
    candidates,
    evened,
    measure,
    smallest,
    started,
)
from vitcompress.search.sensitivity import divergence

FEWEST_IMAGES = 32
FITTED_TOKENS = 12_000  # enough for regressions on a few thousand neurons
BUILT = 3
DROP_ROUNDS = 7
_SIZE_ROUNDS = 12
_COMPARED_STORES = ("source", "int8", "int4")


@dataclass(frozen=True)
class Found:
    """The plan that reaches a target best.

    Attributes:
        plan: it.
        store: how its file holds the weights.
        tried: what it was chosen from, best first.
        measured: the options.
    """

    plan: Plan
    store: str
    tried: tuple[Candidate, ...]
    measured: Measured

    def reasons(self) -> tuple[str, ...]:
        """What the plan was chosen from, one line each, best first."""
        return tuple(
            f"{c.name}: {c.plan.size.student_params:,} parameters, "
            + ("" if math.isnan(c.predicted) else f"{c.predicted:.3f} nats predicted, ")
            + ("not built" if math.isnan(c.cost) else f"{c.cost:.3f} as started")
            for c in self.tried
        )


@dataclass(frozen=True)
class Search:
    """What a search is given.

    Attributes:
        teacher: in eval mode; not changed.
        name: what the user called it.
        images: for calibration, `[B, C, H, W]`, on the teacher's device: a quarter is kept to choose on.
        store: how the file holds the weights; None: to be chosen, where a size is the target.
        token_kernel: of the token convolution.
        transforms: of every block.
        header_bytes: `(plan, store) -> int`; what a file of the plan has beside its tensors, at most.
        drop: `(student) -> points`; how much worse than the teacher a student is.
        tell: told the share of the measuring that is done, 0–1.
        say: told a line now and then.
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
    def fitted(self) -> Tensor:
        """The images that starts are fitted to."""
        return self.images[: max(1, 3 * len(self.images) // 4)]

    @property
    def held_out(self) -> Tensor:
        """The images that starts are compared on; the same where there is but one."""
        return self.images[len(self.fitted) :] if len(self.images) > 1 else self.images

    @cached_property
    def empty(self) -> nn.Module:
        """The teacher without its weights, to count bytes on: with them, each count would encode them anew."""
        return copy.deepcopy(self.teacher).to("meta")

    def measure(self, kinds: Sequence[str]) -> Measured:
        """Measure every option of some kinds."""
        fitted = self.fitted[: max(FEWEST_IMAGES, math.ceil(FITTED_TOKENS / _fewest_tokens(self.teacher, self.images)))]
        judged = self.held_out[:FEWEST_IMAGES]
        return measure(self.teacher, fitted, judged, kinds, name=self.name, tell=self.tell)


def reach(target: TargetRecipe, search: Search) -> Found:
    """Find the best plan for a target.

    Args:
        target: one of ratio, size and drop.
        search: what is searched.

    Raises:
        PlanError: it is out of reach, with what is not.
    """
    if target.target_size is not None:
        _check_rest(search, target.target_size)
    measured = search.measure(target.kinds)
    if target.target_drop is not None:
        return _within_drop(measured, search, target.target_drop)
    if target.target_size is not None:
        return _within_bytes(measured, search, target.target_size)
    assert target.target_ratio is not None  # one of the three
    params = sum(p.numel() for p in search.teacher.parameters())
    tried = _best(measured, search, math.floor(params / target.target_ratio))
    if not tried:
        most = smallest(measured, search.token_kernel, search.transforms).size.params_ratio
        raise PlanError(
            f"--target-ratio {target.target_ratio:g} is out of reach of {search.name}.",
            hint=f"At most --target-ratio {math.floor(most * 100) / 100:g}, of {', '.join(target.kinds)}.",
        )
    return _found(tried, search, search.store or "source", measured)


def _found(tried: Sequence[Candidate], search: Search, store: str, measured: Measured) -> Found:
    """The best of what was tried, with the bytes that its store takes."""
    weighed = tuple(replace(c, plan=measured_on(c.plan, search.empty, store)) for c in tried)
    return Found(weighed[0].plan, store, weighed, measured)


def _best(
    measured: Measured, search: Search, budget: int, fits: Callable[[Plan], bool] = lambda plan: True
) -> list[Candidate]:
    """The candidates within a budget that fit, the few most promising of them built; best first."""
    found = [c for c in candidates(measured, budget, search.token_kernel, search.transforms) if fits(c.plan)]
    built = [build(candidate, search.teacher, search.fitted, search.held_out) for candidate in found[:BUILT]]
    if built:
        built += _evened(min(built, key=lambda candidate: candidate.cost), measured, search, budget, fits)
    return sorted(built, key=lambda candidate: candidate.cost) + found[BUILT:]


def _evened(
    best: Candidate, measured: Measured, search: Search, budget: int, fits: Callable[[Plan], bool]
) -> list[Candidate]:
    """A plan made more even, by halves for as long as that helps; none where it does not."""
    kept, share = best, 1.0
    while True:
        share /= 2
        plan = evened(best.plan, measured.shapes, budget, share)
        if plan is None or not fits(plan):
            break
        made = build(Candidate(f"{best.name}, evened", plan, math.nan), search.teacher, search.fitted, search.held_out)
        if made.cost >= kept.cost:
            break
        kept = made
    return [] if kept is best else [kept]


def _within_bytes(measured: Measured, search: Search, limit: int) -> Found:
    """The best plan whose file is no larger than `limit`, with the store that costs least on the way."""
    stores = [search.store] if search.store else _COMPARED_STORES
    options = []
    for store in stores:
        budget, predicted = _budget(measured, search, store, limit)
        if math.isfinite(predicted):
            options.append((predicted + _cost_of(store, search), budget, store))
    if not options:
        store = search.store or _COMPARED_STORES[-1]
        least = _file_bytes(smallest(measured, search.token_kernel, search.transforms), search, store)
        raise PlanError(
            f"--target-size {limit:,} bytes is out of reach of {search.name}.",
            hint=f"At least --target-size {math.ceil(least / 1000)}kB, stored as {store}.",
        )
    _, budget, store = min(options)
    tried = _best(measured, search, budget, lambda plan: _file_bytes(plan, search, store) <= limit)
    return _found(tried, search, store, measured)


def _check_rest(search: Search, limit: int) -> None:
    """Make sure, before anything is measured, that what lies outside the blocks is not too large by itself.

    Raises:
        PlanError: it is, in the store that takes the fewest bytes.
    """
    blocks = tuple(f"{block}." for block in family_of(search.empty, search.name).block_names(search.empty))
    stores = [search.store] if search.store else _COMPARED_STORES
    rest = min(
        num_bytes({name: t for name, t in stored_tensors(search.empty, store).items() if not name.startswith(blocks)})
        for store in stores
    )
    if rest > limit:
        raise PlanError(
            f"--target-size {limit:,} bytes is out of reach of {search.name}: {rest:,} are not in its blocks.",
            hint=f"More than --target-size {math.ceil(rest / 1000)}kB, or a smaller model.",
        )


def _budget(measured: Measured, search: Search, store: str, limit: int) -> tuple[int, float]:
    """The most parameters of which a plan's file is no larger than `limit`, and what that plan is predicted to cost.

    The cost is infinite where there is no such plan.
    """

    def predicted(budget: int) -> float:
        best = candidates(measured, budget, search.token_kernel, search.transforms)[0]
        return best.predicted if _file_bytes(best.plan, search, store) <= limit else math.inf

    untouched = _untouched(search, measured)
    if _file_bytes(untouched, search, store) <= limit:
        return untouched.size.student_params, 0.0
    low = smallest(measured, search.token_kernel, search.transforms).size.student_params
    high, cost = untouched.size.student_params, predicted(low)
    for _ in range(_SIZE_ROUNDS if math.isfinite(cost) else 0):
        middle = (low + high) // 2
        found = predicted(middle)
        low, high, cost = (middle, high, found) if math.isfinite(found) else (low, middle, cost)
    return low, cost


def _untouched(search: Search, measured: Measured) -> Plan:
    groups = [Group((block,), ()) for block in measured.shapes.blocks]
    return plan_of(search.teacher, measured.shapes.family, groups, search.transforms, search.token_kernel)


def _file_bytes(plan: Plan, search: Search, store: str) -> int:
    """The most that a file of the plan takes."""
    return measured_on(plan, search.empty, store).size.student_bytes + search.header_bytes(plan, store)


def _cost_of(store: str, search: Search) -> float:
    """What storing the teacher's own weights like that does to its predictions, nats per image."""
    if STORES[store].codec is None:
        return 0.0
    stored = copy.deepcopy(search.teacher)
    round_to(stored, stored_tensors(stored, store), store)
    return divergence(stored.eval(), search.teacher, search.held_out)


def _within_drop(measured: Measured, search: Search, limit: float) -> Found:
    """The smallest plan whose start is not worse than the teacher by more than `limit` points."""
    params = sum(p.numel() for p in search.teacher.parameters())
    least = smallest(measured, search.token_kernel, search.transforms).size.student_params
    low, high = math.log(least / params), 0.0  # of the share that is kept
    found: Found | None = None
    for _ in range(DROP_ROUNDS):
        share = math.exp((low + high) / 2)
        tried = _best(measured, search, math.floor(params * share))
        drop = search.drop(started(tried[0].plan, search.teacher, search.fitted)) if tried else math.inf
        search.say(f"{1 / share:.2f} times smaller: {drop:.2f} points worse before training")
        if drop <= limit:
            high, found = math.log(share), _found(tried, search, search.store or "source", measured)
        else:
            low = math.log(share)
    if found is None:
        raise PlanError(
            f"--target-drop {limit:g}: nothing smaller than {search.name} is as good before training.",
            hint="Allow more, or give --target-ratio and let the training make up for it.",
        )
    return found


def _fewest_tokens(model: nn.Module, images: Tensor) -> int:
    """Tokens of an image, `[B, C, H, W]`, in the model's last stage, where there are fewest."""
    info: Any = model.feature_info
    reduction = int(info[-1]["reduction"])
    return max(1, (images.shape[-2] // reduction) * (images.shape[-1] // reduction))
