"""Aligning blocks does not change what the model computes, and finds what they have in common."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.factories import ROWS, Row, build, images, row_images, tiny
from tests.search.factories import search_of
from vitcompress.initialize.align import align_group, align_model
from vitcompress.initialize.factors import input_moments
from vitcompress.initialize.start import start_student
from vitcompress.plans.make import make_plan
from vitcompress.plans.model import Group, Plan
from vitcompress.recipe import PlanRecipe
from vitcompress.surgery import apply_plan

MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


def plan_of(model: nn.Module, **recipe: Any) -> Plan:
    return make_plan(model, PlanRecipe(**recipe), name="tiny")


def scrambled(block: Any, seed: int) -> Any:
    """A block that computes the same with neurons and heads in another order, and heads turned."""
    draw = torch.Generator().manual_seed(seed)
    made, heads = copy.deepcopy(block), block.attn.num_heads
    neurons, order = (torch.randperm(n, generator=draw) for n in (block.mlp.fc1.out_features, heads))
    dim = block.attn.proj.in_features // heads
    turns = torch.linalg.qr(torch.randn(2, heads, dim, dim, generator=draw))[0][[0, 0, 1]]  # [3, H, D, D]
    with torch.no_grad():
        made.mlp.fc1.weight.copy_(block.mlp.fc1.weight[neurons])
        made.mlp.fc1.bias.copy_(block.mlp.fc1.bias[neurons])
        made.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, neurons])
        weight = block.attn.qkv.weight.unflatten(0, (3, heads, dim))[:, order]
        bias = block.attn.qkv.bias.unflatten(0, (3, heads, dim))[:, order]
        made.attn.qkv.weight.copy_(torch.einsum("phde,phec->phdc", turns, weight).flatten(0, 2))
        made.attn.qkv.bias.copy_(torch.einsum("phde,phe->phd", turns, bias).flatten())
        columns = block.attn.proj.weight.unflatten(1, (heads, dim))[:, order]
        made.attn.proj.weight.copy_(torch.einsum("chd,hed->che", columns, turns[2]).flatten(1))
    return made


def strong() -> Any:
    """A model whose blocks matter: timm's matrices at random are too small to be missed."""
    model: Any = tiny()
    with torch.no_grad():
        for matrix in (p for p in model.blocks.parameters() if p.ndim > 1):
            matrix *= 10
    return model


def doubled() -> tuple[nn.Module, Tensor]:
    """A model whose blocks 1 to 3 compute what block 0 does with other matrices, and images."""
    model = strong()
    for index in (1, 2, 3):
        model.blocks[index] = scrambled(model.blocks[0], seed=index)
    return model.eval(), images(model, 8)


def test_scrambling_a_block_changes_its_matrices_and_not_what_it_computes() -> None:
    model, x = doubled()
    plain = copy.deepcopy(model)
    for index in (1, 2, 3):
        plain.blocks[index] = copy.deepcopy(plain.blocks[0])  # type: ignore[index, operator]
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    one, other = (model.get_parameter(f"blocks.{index}.mlp.fc1.weight") for index in (0, 1))
    assert (one - other).norm() > one.norm() / 2


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_turned_model_computes_the_same(row: Row) -> None:
    teacher, x = build(row), row_images(row)
    turned = align_model(teacher, plan_of(teacher, share=2))
    with torch.no_grad():
        torch.testing.assert_close(turned(x), teacher(x), rtol=1e-4, atol=1e-5)


def test_what_shares_nothing_is_not_copied() -> None:
    teacher = tiny()
    assert align_model(teacher, plan_of(teacher, share=1)) is teacher
    assert align_model(teacher, plan_of(teacher, share=2, basis=3, matrices=False)) is teacher


@pytest.mark.parametrize("variant", ["qk-norm", "swiglu"])
def test_what_has_no_such_freedom_stays_as_it_is(variant: str) -> None:
    teacher = tiny(variant)
    turned = align_model(teacher, plan_of(teacher, share=2))
    kept = "attn" if variant == "qk-norm" else "mlp"
    for name, parameter in turned.named_parameters():
        if f".{kept}." in name:
            assert torch.equal(parameter, teacher.get_parameter(name)), name


@pytest.mark.parametrize("share", [2, 4])
def test_blocks_that_are_alike_up_to_order_and_rotation_become_equal(share: int) -> None:
    teacher, _ = doubled()
    turned = align_model(teacher, plan_of(teacher, share=share))
    for first in range(0, 4, share):
        for index in range(first + 1, first + share):
            for name in (*MATRICES, "attn.qkv.bias", "mlp.fc1.bias"):
                one, other = (turned.get_parameter(f"blocks.{i}.{name}") for i in (first, index))
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ({}, "first"), ({}, "mean"), ({}, "calibrated"), ({"share_biases": True}, "calibrated"),
        ({"adapter_rank": 2}, "first"),
    ],
    ids=str,
)  # fmt: skip
def test_such_blocks_share_without_loss(recipe: dict[str, Any], method: str) -> None:
    teacher, x = doubled()
    plan = plan_of(teacher, share=4, **recipe)
    source = align_model(teacher, plan)
    student = copy.deepcopy(source)
    apply_plan(student, plan)
    start_student(student.eval(), source, plan, lambda: x.split(4), method)
    with torch.no_grad():
        torch.testing.assert_close(student(x), teacher(x), rtol=1e-3, atol=1e-4)


def test_the_search_finds_that_they_cost_nothing() -> None:
    costs = []
    for teacher in (doubled()[0], strong()):
        search = search_of(teacher)
        options = search.measure(("share", "adapter"), lambda done: None).at(math.inf)
        costs.append({(o.scale, o.group.blocks, o.dial): o.nats for o in options})
    assert len(costs[0]) > 20
    for key, nats in costs[1].items():
        assert costs[0][key] < 1e-3 * nats, key


def test_aligning_turns_the_inputs_of_the_layers_that_write_alone() -> None:
    """So moments of aligned blocks are measured in the aligned model; nothing else moves."""
    teacher, x = tiny(), images(tiny(), 8)
    group = Group(("blocks.0", "blocks.2"), MATRICES, dict.fromkeys(("attn.proj", "mlp.fc2", "mlp.fc1"), 1))
    before = input_moments(teacher, [group], [x])
    align_group(teacher, group)
    after = input_moments(teacher, [group], [x])
    torch.testing.assert_close(before["blocks.2.mlp.fc1"].xx, after["blocks.2.mlp.fc1"].xx, rtol=1e-4, atol=1e-4)
    order = before["blocks.2.mlp.fc2"].mean.argsort(), after["blocks.2.mlp.fc2"].mean.argsort()
    assert not torch.equal(*order)
    pairs = [
        moments["blocks.2.mlp.fc2"].covariance()[at][:, at] for moments, at in zip((before, after), order, strict=True)
    ]
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-5)
