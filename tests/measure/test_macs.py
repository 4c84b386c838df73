"""The multiply-accumulates that a plan foretells are those of the student that is built."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from tests.factories import ROWS, VARIANTS, Row, build, compressed, images, planned, student_of, tiny
from vitcompress.measure.macs import macs_of, with_macs
from vitcompress.pipeline import plan as pipeline
from vitcompress.pipeline.write import notes_on
from vitcompress.plans.make import make_plan
from vitcompress.plans.model import Size
from vitcompress.recipe import ModelRecipe, PlanRecipe

DIM, DEPTH, HEADS, CLASSES, PATCHES = 24, 4, 3, 5, 16
TOKENS = PATCHES + 1
SMALLER = "Sharing makes a model smaller, not faster: every block is still computed."


def size_of(model: nn.Module) -> tuple[int, int, int]:
    _, channels, rows, cols = images(model).shape
    return channels, rows, cols


def counted(model: nn.Module, *transforms: str) -> Size:
    plan = make_plan(model, PlanRecipe(share=2, transforms=transforms), name="tiny")  # type: ignore[arg-type]
    return with_macs(plan, model, size_of(model)).size


def both_ways(model: nn.Module, size: tuple[int, int, int]) -> set[int]:
    """What is counted on the model's own device with fused attention, and without."""
    found = set()
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused  # type: ignore[assignment]
        found.add(macs_of(model, size))
    return found


@pytest.mark.thorough
def test_a_plain_vit_has_the_closed_form() -> None:
    embed = 8 * 8 * 3 * DIM * PATCHES
    block = 12 * DIM * DIM * TOKENS + 2 * TOKENS * TOKENS * DIM  # four matrices; QKᵀ and ·V over all heads
    teacher = embed + DEPTH * block + DIM * CLASSES
    added = {
        "heads": 2 * HEADS * HEADS * TOKENS * TOKENS,
        "mlp": 3 * 3 * DIM * PATCHES,
        "rpe": 49 * DIM * PATCHES,
    }
    assert counted(tiny()).teacher_macs == counted(tiny()).student_macs == teacher
    for transform, macs in added.items():
        assert counted(tiny(), transform).student_macs == teacher + DEPTH * macs
    assert counted(tiny(), *added).student_macs == teacher + DEPTH * sum(added.values())


@pytest.mark.broad
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("transforms", [(), ("heads", "mlp")], ids=str)
def test_a_tiny_plan_counts_what_is_built(variant: str, transforms: tuple[str, ...]) -> None:
    teacher = tiny(variant)
    student, _ = compressed(teacher, share=2, transforms=transforms)
    found = counted(teacher, *transforms)
    assert both_ways(teacher, size_of(teacher)) == {found.teacher_macs}
    assert both_ways(student, size_of(teacher)) == {found.student_macs}


@pytest.mark.broad
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("transformed", [False, True])
def test_a_plan_counts_what_is_built_in_every_family(row: Row, transformed: bool) -> None:
    teacher, size = build(row), (3, *row.image)
    with torch.device("meta"):
        empty = timm.create_model(row.architecture, **row.args)
    plan = planned(empty, share=2, transforms=row.transforms if transformed else ())
    found = with_macs(plan, empty, size)
    assert both_ways(teacher, size) == {found.size.teacher_macs}
    assert both_ways(student_of(teacher, plan).eval(), size) == {found.size.student_macs}
    assert planned(empty, share=2, transforms=plan.transforms) == plan  # counting changes neither model nor plan
    assert (found.size.student_macs == found.size.teacher_macs) != transformed


def test_the_plan_of_a_published_model_has_its_published_count() -> None:
    size = pipeline.plan(ModelRecipe("deit_base"), PlanRecipe(share=12, transforms=())).size
    assert size.teacher_macs == size.student_macs == 17_563_828_224  # timm's table: 17.6 G
    assert size.macs_ratio == 1


def test_only_a_student_that_computes_less_is_not_called_no_faster() -> None:
    plan = make_plan(tiny(), PlanRecipe(transforms=()), name="tiny")
    for macs, noted in (((10, 10), True), ((10, 12), True), ((10, 9), False), ((None, None), True)):
        teacher, student = macs
        size = Size(1, 1, 1.0, 1, 1, 1.0, teacher, student)
        assert (SMALLER in notes_on(replace(plan, size=size))) == noted
