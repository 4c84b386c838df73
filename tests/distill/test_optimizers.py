import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.factories import ROWS, Row, build, compressed, images, tiny
from vitcompress.distill.optimizers import (
    lr_factor,
    lr_for_start,
    make_optimizers,
    parameter_groups,
    running_mean,
    set_lr,
)
from vitcompress.distill.state import set_parameters
from vitcompress.distill.student import check_student
from vitcompress.families.registry import family_of
from vitcompress.layers import transforms
from vitcompress.recipe import DEFAULT_LR, DistillRecipe


def test_only_matrices_decay_and_each_once() -> None:
    student, _ = compressed(tiny(), share=4)
    decay, plain = parameter_groups(student, DistillRecipe(weight_decay=0.05))
    names = {id(p): name for name, p in student.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    assert decayed == {
        "patch_embed.proj.weight", "head.weight",
        *(f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }  # fmt: skip
    assert len(decay["params"]) + len(plain["params"]) == len(names)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


def test_every_transformation_is_without_decay() -> None:
    modules = {m for m in vars(transforms).values() if isinstance(m, type) and issubclass(m, nn.Module)}
    assert set(transforms.TRANSFORM_MODULES) == modules


def test_tables_of_relative_positions_do_not_decay() -> None:
    class Model(nn.Module):  # without no_weight_decay()
        def __init__(self) -> None:
            super().__init__()
            self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 3))
            self.rel_pos_h = nn.Parameter(torch.zeros(9, 3))
            self.proj = nn.Linear(3, 3)

    model = Model()
    decay, plain = parameter_groups(model, DistillRecipe())
    assert decay["params"] == [model.proj.weight]
    assert len(plain["params"]) == 3


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_every_family_can_train_and_its_tables_do_not_decay(row: Row) -> None:
    model = build(row)
    family = family_of(model, row.architecture)
    blocks = family.block_names(model)
    check_student(model, blocks, DistillRecipe(drop_path=0.1, grad_checkpointing=True), name=row.architecture)
    decayed = {id(p) for p in parameter_groups(model, DistillRecipe())[0]["params"]}
    for block in blocks:
        for name, p in model.get_submodule(block).named_parameters():
            if family.weights.fullmatch(name):
                assert id(p) in decayed, name
            if family.tables.fullmatch(name):
                assert id(p) not in decayed, name


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    student, plan = compressed(tiny(), share=2)
    muon, adamw = make_optimizers(student, DistillRecipe(optimizer="muon", matrix_lr=0.03), plan.matrices)
    names = {id(p): name for name, p in student.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {
        f"blocks.{donor}.{layer}.weight"
        for donor in (0, 2)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert taken | rest == set(names.values())
    assert not taken & rest
    assert muon.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize(
    ("recipe", "taken"),
    [
        ({"share": 4, "basis": 3, "matrices": False}, set()),
        ({"share": 4, "basis": 3}, {"attn.qkv.base", "mlp.fc2.base"}),
    ],
    ids=["factors alone", "factors on matrices"],
)
def test_muon_leaves_factors_to_adamw(recipe: dict[str, Any], taken: set[str]) -> None:
    student, plan = compressed(tiny(), **recipe)
    found = make_optimizers(student, DistillRecipe(optimizer="muon"), plan.matrices)
    assert len(found) == (2 if taken else 1)
    trained = [id(p) for optimizer in found for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in student.parameters())
    first = {id(p) for group in found[0].param_groups for p in group["params"]}
    assert all(id(student.get_parameter(f"blocks.0.{name}")) in first for name in taken)


def test_muon_orthogonalises_the_step() -> None:
    """A step from zero momentum has nearly orthogonal rows, whatever the gradient's scale."""
    weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    model = nn.ParameterDict({"w": weight})
    muon, _ = make_optimizers(model, DistillRecipe(optimizer="muon", matrix_lr=1.0), {"w"})
    weight.grad = 1e-3 * torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    muon.step()
    assert torch.linalg.svdvals(weight.detach()).sub(1).abs().max() < 0.4


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    assert lr_factor(0.05, 0.1) == pytest.approx(0.5)
    assert lr_factor(0.1, 0.1) == 1.0
    assert lr_factor(0.55, 0.1) == pytest.approx(0.5)
    assert lr_factor(1.0, 0.1) == pytest.approx(0.0)
    assert lr_factor(0.0, 0.0) == 1.0


def start_lr(nats: float, chance: float, batch_size: int, width: int, num_images: float) -> float:
    lr = lr_for_start(nats, chance, batch_size, width, num_images, trained=False)
    assert lr_for_start(nats, chance, batch_size, width, num_images, trained=True) == lr / 2
    return lr


def test_the_learning_rate_of_a_start_in_closed_form() -> None:
    few, many = 600, math.inf
    assert start_lr(0.0, 2.0, 16, 96, few) == pytest.approx(3.5e-5)
    assert start_lr(0.2, 2.0, 16, 96, few) == pytest.approx(4e-5 * 10**0.1)
    assert start_lr(2.0, 2.0, 16, 96, few) == pytest.approx(5e-4)
    assert start_lr(2.0, 2.0, 16, 96, many) == pytest.approx(1e-3)  # the upper bound
    assert start_lr(2.0, 2.0, 16, 192, many) == pytest.approx(5e-4)
    assert start_lr(2.0, 2.0, 16, 768, many) == pytest.approx(2e-4)
    assert start_lr(1.0, 2.0, 16, 96, few) == pytest.approx(5e-5 * 10**0.5)
    # noise falls with the square root of the batch size
    assert start_lr(1.0, 2.0, 64, 96, few) == pytest.approx(1e-4 * 10**0.5)
    assert start_lr(50.0, 2.0, 16, 96, few) == pytest.approx(5e-4)  # worse than chance counts as chance
    assert start_lr(0.0, 0.0, 16, 96, few) == pytest.approx(5e-4)  # a teacher with constant predictions
    assert start_lr(2.0, 2.0, 16, 192, few) == pytest.approx(2.5e-4)
    assert start_lr(2.0, 2.0, 16, 768, few) == start_lr(2.0, 2.0, 16, 1408, few) == pytest.approx(1e-4)
    assert start_lr(2.0, 2.0, 16, 24, few) == pytest.approx(5e-4)


def test_the_learning_rate_grows_with_the_images_unless_the_model_is_wide() -> None:
    assert start_lr(0.0, 2.0, 16, 96, 0) == pytest.approx(3.5e-5)
    assert start_lr(0.0, 2.0, 16, 96, 2400) == pytest.approx(7e-5)
    assert start_lr(0.0, 2.0, 16, 192, math.inf) == pytest.approx(3.5e-4 / 3)
    assert start_lr(1.0, 2.0, 16, 192, 2400) == pytest.approx(1e-4 * 5**0.5)
    assert start_lr(0.0, 2.0, 16, 384, 5400) == pytest.approx(0.7 * 7.5e-5)
    assert start_lr(1.0, 2.0, 16, 768, 2400) == start_lr(1.0, 2.0, 16, 768, 0) == pytest.approx(5e-5 * 2**0.5)


def test_a_typed_learning_rate_wins_over_the_constant() -> None:
    assert DistillRecipe(lr=3e-4).peak_lr == 3e-4
    assert DistillRecipe().peak_lr == DEFAULT_LR


def test_learning_rates_follow_their_own_peaks() -> None:
    student, plan = compressed(tiny(), share=2)
    both = make_optimizers(student, DistillRecipe(optimizer="muon", lr=1e-3, matrix_lr=0.02), plan.matrices)
    for factor in (0.5, 0.1):
        for optimizer in both:
            set_lr(optimizer, factor)
    assert [group["lr"] for optimizer in both for group in optimizer.param_groups] == pytest.approx([2e-3, 1e-4, 1e-4])


def test_the_running_mean_by_hand() -> None:
    """The first update copies the model, later ones keep 2/11, 3/12 and at most the decay 0.24."""
    model = nn.Linear(1, 1, bias=False)
    mean: Any = running_mean(model, 0.24)
    found = []
    for value in (5.0, 0.0, 1.0, 1.0):
        nn.init.constant_(model.weight, value)
        mean.update_parameters(model)
        found.append(mean.module.weight.item())
    first = 5.0
    second = first * 2 / 11
    third = second * 0.24 + 0.76
    assert found == pytest.approx([first, second, third, third * 0.24 + 0.76])


def test_the_running_mean_shares_as_the_student_does_and_moves_once_a_step() -> None:
    student, plan = compressed(tiny(), share=4)
    mean: Any = running_mean(student, 0.1)
    start = copy.deepcopy(student.state_dict())
    mean.update_parameters(student)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    mean.update_parameters(student)
    assert sum(p.numel() for p in mean.module.parameters()) == plan.size.student_params
    assert mean.module.blocks[0].mlp.fc1.weight is mean.module.blocks[3].mlp.fc1.weight
    for name, value in mean.module.state_dict().items():  # 0.1 of the old and 0.9 of the new
        torch.testing.assert_close(value, start[name] + 0.9, msg=name)
    set_parameters(student, mean.module.parameters())
    assert torch.equal(student(images(student)), mean.module(images(student)))
