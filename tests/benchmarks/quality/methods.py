"""Which methods are compared? One function each: from teacher and budget to untrained student."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vitcompress.data.augmentation import seeded
from vitcompress.errors import PlanError
from vitcompress.families.registry import family_of
from vitcompress.initialize.align import align_model
from vitcompress.initialize.start import start_student
from vitcompress.layers.transforms import HeadMix
from vitcompress.plans.make import make_plan
from vitcompress.plans.model import Plan
from vitcompress.quantize.codecs import num_bytes
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.recipe import PlanRecipe, TargetRecipe
from vitcompress.search.model import Search
from vitcompress.search.target import search_target
from vitcompress.surgery import apply_plan

SMALLEST = "smallest"
WHOLE = "1"  # the ratio of what keeps all of the teacher's parameters
LOGITS_AND_HIDDEN = {"logits": 1.0, "hidden": 1.0}
NO_TRANSFORMS: tuple[()] = ()


class UnfitError(Exception):
    """A method has no student of the size asked for."""


@dataclass(frozen=True)
class Case:
    """What a method starts from.

    Attributes:
        teacher: in eval mode; not to be changed.
        name: of the model.
        share: blocks per group, of the methods that share whole matrices.
        budget_params: parameters of a student that shares so, with the product's transformations;
            none may have more.
        calibration: images `[N, C, H, W]`.
        input_size: (channels, height, width).
        seed: of what is random.
    """

    teacher: nn.Module
    name: str
    share: int
    budget_params: int
    calibration: Tensor
    input_size: tuple[int, int, int]
    seed: int = 0

    def plan(self, **options: Any) -> Plan:
        """What `vitcompress plan` would make of some options."""
        return make_plan(self.teacher, PlanRecipe(**options), name=self.name)

    def fits(self, **options: Any) -> bool:
        """Whether a plan of these options is within the budget."""
        return self.plan(**options).size.student_params <= self.budget_params


@dataclass(frozen=True)
class Start:
    """A student before training.

    Attributes:
        student: it.
        plan: None where it is none of the product's.
        source: what it was made of, and learns from.
    """

    student: nn.Module
    plan: Plan | None
    source: nn.Module


Build = Callable[[Case], Start]


@dataclass(frozen=True)
class Method:
    """A way to compress.

    Attributes:
        build: makes the student.
        about: what it is, for the reader of the table.
        losses: weights of the losses it trains by; nothing where it does not train.
        ours: whether it trains with the options that the product brings for the model, where they
            fit its plan.
        whole: whether it keeps all of the teacher's parameters: there is one for all ratios then.
        random: whether the start depends on the seed.
        store: how its weights are stored in the end.
    """

    build: Build
    about: str
    losses: Mapping[str, float] = field(default_factory=lambda: LOGITS_AND_HIDDEN)
    ours: bool = False
    whole: bool = False
    random: bool = False
    store: str = "source"


def started(case: Case, plan: Plan, start: str = "calibrated", *, turned: bool = True) -> Start:
    """The student that the product makes of a plan.

    Args:
        case: the teacher.
        plan: of it.
        start: of whole shared matrices.
        turned: blocks that share are turned towards one another first.
    """
    source = align_model(case.teacher, plan) if turned else case.teacher
    student = copy.deepcopy(source)
    apply_plan(student, plan)
    start_student(student.eval(), source, plan, lambda: case.calibration.split(32), start)
    return Start(student, plan, source)


def random_start(case: Case) -> Start:
    """Shared blocks from random weights; embedding and head are the teacher's."""
    made = started(case, case.plan(share=case.share), "first", turned=False)
    with seeded(case.seed), torch.no_grad():
        for block in family_of(made.student, case.name).block_names(made.student):
            for module in made.student.get_submodule(block).modules():
                if isinstance(module, nn.Linear):
                    trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                elif isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
    return made


def released_start(case: Case) -> Start:
    """The donor's weights, and head mixes near zero: MiniViT's released code."""
    made = started(case, case.plan(share=case.share), "first", turned=False)
    with seeded(case.seed), torch.no_grad():
        for module in made.student.modules():
            if isinstance(module, HeadMix):
                nn.init.normal_(module.weight, std=0.02)
    return made


def first_block(case: Case) -> Start:
    """Shared matrices of each group's first block; transformations start as the identity."""
    return started(case, case.plan(share=case.share), "first", turned=False)


def calibrated(case: Case) -> Start:
    """Shared matrices fitted to images, of blocks as they stand."""
    return started(case, case.plan(share=case.share), turned=False)


def turned(case: Case) -> Start:
    """Shared matrices fitted to images, of blocks turned towards one another."""
    return started(case, case.plan(share=case.share))


def residuals(case: Case) -> Start:
    """Half as many shared matrices, and residuals of the rank that fills the budget."""
    depth = len(_blocks(case))
    if case.share >= depth:
        raise UnfitError("one matrix for all blocks cannot be halved")
    share = min(2 * case.share, depth)
    return _of_rank(case, "adapter_rank", share=share)


def bases(case: Case) -> Start:
    """No whole matrices: factors, one of which all blocks of a stage share."""
    return _of_rank(case, "basis", share=len(_blocks(case)), matrices=False)


def low_rank(case: Case) -> Start:
    """Factors of each block's own, whitened by its inputs; nothing shared, nothing added."""
    return _of_rank(case, "adapter_rank", share=1, matrices=False, transforms=NO_TRANSFORMS)


def _of_rank(case: Case, option: str, **options: Any) -> Start:
    weights = (p for p in case.teacher.get_submodule(_blocks(case)[0]).parameters() if p.ndim == 2)
    rank = largest(lambda rank: case.fits(**{option: rank}, **options), min(min(p.shape) for p in weights))
    if rank == 0:
        raise UnfitError("not even rank 1 is within the budget")
    return started(case, case.plan(**{option: rank}, **options))


def narrow(case: Case) -> Start:
    """Every block of its own, all of them narrower by the same share."""
    parts = 1024
    width = largest(lambda part: case.fits(share=1, width=part / parts), parts - 1)
    if width == 0:
        raise UnfitError("not even one channel per head is within the budget")
    return started(case, case.plan(share=1, width=width / parts))


def planned(case: Case) -> Start:
    """What the product's planner makes of the budget."""
    params = sum(p.numel() for p in case.teacher.parameters())
    num_judged = len(case.calibration) // 4  # costs are measured on images that nothing is fitted to
    search = Search(
        teacher=case.teacher, name=case.name, fitted=case.calibration[num_judged:],
        judged=case.calibration[:num_judged], store="source", token_kernel=PlanRecipe().token_kernel,
        transforms=PlanRecipe().transforms or (), multiple=TargetRecipe().width_multiple, memory_bytes=4e9,
        header_bytes=lambda *_: 0, drop=lambda student: 0.0, say=lambda line: None,
    )  # fmt: skip
    try:
        return started(
            case, search_target(TargetRecipe(target_ratio=params / case.budget_params), search, lambda done: None).plan
        )
    except PlanError as error:
        raise UnfitError(f"out of the planner's reach: {error.hint.lower()}") from error


def fewer_blocks(case: Case) -> Start:
    """The teacher with fewer blocks, evenly spread, the first and the last among them."""
    student: Any = copy.deepcopy(case.teacher)
    blocks = student.blocks  # plain ViTs alone have one list of blocks
    each = sum(p.numel() for p in blocks[0].parameters())
    rest = sum(p.numel() for p in student.parameters()) - each * len(blocks)
    count = (case.budget_params - rest) // each
    if count < 1:
        raise UnfitError("not even one whole block is within the budget")
    kept = [round(k * (len(blocks) - 1) / max(1, count - 1)) for k in range(count)]
    student.blocks = nn.Sequential(*(blocks[index] for index in kept))
    return Start(student, None, case.teacher)


def as_it_is(case: Case) -> Start:
    """The teacher."""
    return Start(copy.deepcopy(case.teacher), None, case.teacher)


METHODS: Mapping[str, Method] = {
    "teacher": Method(as_it_is, "as it is", losses={}, whole=True),
    "random": Method(
        random_start, "shared matrices, random blocks, logits alone", losses={"logits": 1.0}, random=True
    ),
    "released": Method(
        released_start, "shared matrices, the donor's weights and head mixes from N(0, 0.02), as in MiniViT's code",
        random=True,
    ),
    "first": Method(first_block, "shared matrices of the first block, transformations the identity"),
    "calibrated": Method(calibrated, "shared matrices fitted to images, blocks as they stand"),
    "shared": Method(turned, "ours, shared matrices, as the product starts and trains them", ours=True),
    "residuals": Method(residuals, "ours, half as many shared matrices, each block with a residual (`--adapter-rank`)"),
    "bases": Method(bases, "ours, one basis per stage (`--no-matrices --basis`)"),
    "narrow": Method(narrow, "ours, narrow blocks (`--share 1 --width`)"),
    "planned": Method(planned, "ours, as the planner chooses", ours=True),
    "low-rank": Method(low_rank, "whitened low rank, nothing shared (`--no-matrices --adapter-rank`)"),
    "fewer-blocks": Method(fewer_blocks, "the teacher cut to fewer whole blocks"),
    "int8": Method(
        as_it_is, "the teacher in int8, not trained", losses={}, whole=True, store="int8"
    ),
    "int4": Method(
        as_it_is, "the teacher in int4, not trained", losses={}, whole=True, store="int4"
    ),
    "planned-int8": Method(
        planned, "ours, as the planner chooses, in int8", ours=True, store="int8"
    ),
}  # fmt: skip


def keep_stored(model: nn.Module, store: str) -> int:
    """Round a model's weights to a store, in place; returns the bytes that they take there.

    Args:
        model: any.
        store: a key of `STORES`.
    """
    stored = stored_tensors(model, store)
    round_to(model, stored, store)
    return num_bytes(stored)


def share_for(teacher: nn.Module, name: str, ratio: str) -> tuple[int, int]:
    """Return the blocks per group whose ratio is nearest to `ratio`, and the parameters left.

    Args:
        teacher: the model.
        name: of it.
        ratio: a number, or `smallest`.
    """
    depth = len(family_of(teacher, name).block_names(teacher))
    sizes = {
        share: make_plan(teacher, PlanRecipe(share=share), name=name).size
        for share in ((depth,) if ratio == SMALLEST else range(2, depth + 1))
    }
    wanted = 1.0 if ratio == SMALLEST else float(ratio)
    share = min(sizes, key=lambda share: abs(math.log(sizes[share].params_ratio / wanted)))
    return share, sizes[share].student_params


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits; 0 if none does. Below it, all must fit."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _blocks(case: Case) -> list[str]:
    return list(family_of(case.teacher, case.name).block_names(case.teacher))
