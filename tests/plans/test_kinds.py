"""Plans with factors and narrow blocks: their sizes, identities, and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.factories import compressed, images, tiny
from vitcompress.errors import PlanError
from vitcompress.families.narrow import narrow_block
from vitcompress.families.vit import VIT
from vitcompress.families.widths import Widths
from vitcompress.layers.factored import FactoredLinear
from vitcompress.plans.make import make_plan, with_sizes_on
from vitcompress.quantize.codecs import STORES, num_bytes
from vitcompress.quantize.store import stored_tensors
from vitcompress.recipe import PlanRecipe
from vitcompress.surgery import apply_plan

KINDS: dict[str, dict[str, Any]] = {
    "adapters": {"share": 2, "adapter_rank": 3},
    "bases on matrices": {"share": 2, "basis": 3},
    "bases": {"share": 4, "basis": 5, "matrices": False},
    "low rank": {"share": 1, "adapter_rank": 5, "matrices": False},
    "cycle": {"share": 2, "pattern": "cycle", "adapter_rank": 2},
    "narrow": {"share": 1, "width": 0.5},
    "narrow and shared": {"share": 2, "width": 0.5},
}


@pytest.mark.broad
@pytest.mark.parametrize("transforms", [(), ("heads", "mlp")], ids=["plain", "transformed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["vit", "layer-scale", "swiglu", "qk-norm"])
def test_the_plan_counts_what_is_built(variant: str, kind: str, transforms: tuple[str, ...]) -> None:
    teacher = tiny(variant)
    try:
        plan = make_plan(teacher, PlanRecipe(**KINDS[kind], transforms=transforms), name="tiny")  # type: ignore[arg-type]
    except PlanError:
        assert (variant, KINDS[kind].get("width")) in {("swiglu", 0.5)}  # its MLP has gates
        return
    student = copy.deepcopy(teacher)
    apply_plan(student, plan)
    assert sum(p.numel() for p in student.parameters()) == plan.size.student_params
    for store in STORES:
        assert num_bytes(stored_tensors(student, store)) == with_sizes_on(plan, teacher, store).size.student_bytes, (
            store
        )
    assert plan.size.student_params < plan.size.teacher_params
    assert torch.isfinite(student(images(teacher))).all()


def test_a_factored_layer_is_the_layer_of_its_matrix() -> None:
    torch.manual_seed(0)
    for whole in (True, False):
        layer = FactoredLinear(nn.Linear(7, 5), 3, whole=whole)
        nn.init.normal_(layer.up)
        nn.init.normal_(layer.down)
        x = torch.randn(2, 4, 7)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", ["adapters", "bases on matrices"])
def test_residuals_start_at_plain_sharing(kind: str) -> None:
    teacher = tiny()
    shared, _ = compressed(teacher, share=2, transforms=())
    student, _ = compressed(teacher, **KINDS[kind], transforms=())
    assert torch.equal(student(images(teacher)), shared(images(teacher)))


def test_shared_bases_are_one_object_on_the_side_of_the_stream() -> None:
    student, plan = compressed(tiny(), **KINDS["bases"], transforms=())
    first, last = (dict(student.get_submodule(f"blocks.{i}").named_parameters()) for i in (0, 3))
    assert {name for name, p in first.items() if p is last[name]} == {
        "attn.qkv.down", "attn.proj.up", "mlp.fc1.down", "mlp.fc2.up",
    }  # fmt: skip
    assert plan.groups[0].bases == ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def test_cyclic_groups_take_every_nth_block() -> None:
    plan = make_plan(tiny(), PlanRecipe(share=2, pattern="cycle"), name="tiny")
    assert [group.blocks for group in plan.groups] == [("blocks.0", "blocks.2"), ("blocks.1", "blocks.3")]


def test_a_block_narrowed_to_its_own_widths_is_itself() -> None:
    teacher = tiny()
    original = teacher.get_submodule("blocks.0")
    block = copy.deepcopy(original)
    narrow_block(block, Widths(hidden=96, qk=8, v=8), VIT.narrow_attention)
    x = torch.randn(2, 17, 24)
    torch.testing.assert_close(block(x), original(x))


def test_a_narrow_attention_masks_as_the_teachers_does() -> None:
    teacher = tiny()
    block = copy.deepcopy(teacher.get_submodule("blocks.0"))
    narrow_block(block, Widths(qk=8, v=8), VIT.narrow_attention)
    mask, x = torch.rand(1, 1, 17, 17) > 0.3, torch.randn(2, 17, 24)
    expected: nn.Module = teacher.get_submodule("blocks.0.attn")
    torch.testing.assert_close(block.get_submodule("attn")(x, attn_mask=mask), expected(x, attn_mask=mask))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"adapter_rank": 25}, r"--adapter-rank 25: blocks\.0\.attn\.qkv of tiny has rank 24 at most"),
        ({"basis": 25, "matrices": False}, r"--basis 25: .* rank 24 at most"),
        ({"share": 1, "adapter_rank": 2}, "nothing to add"),
        ({"width": 0.5, "transforms": ("rpe",)}, "--transforms rpe"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(tiny(), PlanRecipe(**recipe), name="tiny")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"adapter_rank": 2, "basis": 2}, "cannot be used together. Give only one of them"),
        ({"width": 0.5, "basis": 2}, "cannot be used together. Give only one of them"),
        ({"matrices": False}, "--no-matrices needs"),
        ({"groups": "0-3", "pattern": "cycle"}, "cannot be used together. Give only one of them"),
    ],
)
def test_contradictions_are_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanRecipe(**recipe)
