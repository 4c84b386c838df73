import copy
import shutil
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from tests.factories import ROWS, Row, build, compressed, images, tiny
from vitcompress.distill.hooks import tap_outputs
from vitcompress.distill.training import (
    check_student,
    compiling,
    copy_parameters,
    lr_factor,
    lr_for_start,
    parameter_groups,
    running_mean,
    training_student,
)
from vitcompress.errors import RecipeError
from vitcompress.families.base import Tap
from vitcompress.families.find import family_of
from vitcompress.layers import transforms
from vitcompress.recipe import DEFAULT_LR, DistillRecipe

BLOCKS = [f"blocks.{i}" for i in range(4)]


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


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    assert lr_factor(0.05, 0.1) == pytest.approx(0.5)
    assert lr_factor(0.1, 0.1) == 1.0
    assert lr_factor(0.55, 0.1) == pytest.approx(0.5)
    assert lr_factor(1.0, 0.1) == pytest.approx(0.0)
    assert lr_factor(0.0, 0.0) == 1.0


def test_every_transformation_is_without_decay() -> None:
    modules = {m for m in vars(transforms).values() if isinstance(m, type) and issubclass(m, nn.Module)}
    assert set(transforms.TRANSFORM_MODULES) == modules


def test_tables_of_relative_positions_do_not_decay() -> None:
    class Model(nn.Module):  # says nothing of weight decay itself
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


def test_drop_path_grows_with_depth_and_leaves() -> None:
    student, plan = compressed(tiny(), share=4)
    x = images(student)
    before = student(x)
    with training_student(student, BLOCKS, DistillRecipe(drop_path=0.3)):
        rates = [
            (block.drop_path1.drop_prob, block.drop_path2.drop_prob)
            for block in student.blocks  # type: ignore[union-attr]
        ]
        assert rates == [(pytest.approx(r), pytest.approx(r)) for r in (0.0, 0.1, 0.2, 0.3)]
        assert sum(p.numel() for p in student.parameters()) == plan.size.student_params
        student.eval()
        assert torch.equal(student(x), before)
        student.train()
        assert not torch.equal(student(x), before)
    assert not student.training
    assert not any(isinstance(module, DropPath) for module in student.modules())
    assert torch.equal(student(x), before)


def test_rates_are_those_that_timm_builds() -> None:
    built = tiny(drop_path_rate=0.3)
    student = tiny()
    with training_student(student, BLOCKS, DistillRecipe(drop_path=0.3)):
        for name in BLOCKS[1:]:
            ours, theirs = (model.get_submodule(f"{name}.drop_path2") for model in (student, built))
            assert ours.drop_prob == pytest.approx(theirs.drop_prob)


@pytest.mark.parametrize("share", [1, 4])
def test_a_checkpointed_step_gives_the_same_gradients(share: int) -> None:
    student, _ = compressed(tiny(), share=share)
    x = images(student, 3)
    gradients = []
    for checkpointing in (False, True):
        with training_student(student, BLOCKS, DistillRecipe(grad_checkpointing=checkpointing)):
            student.zero_grad()
            student(x).square().sum().backward()
            gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(student.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert not student.grad_checkpointing


def test_the_running_mean_by_hand() -> None:
    """From 1 at the start; the first update copies, the next keep 2/11, 3/12 and at most the decay of 0.24."""
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
    for name, value in mean.module.state_dict().items():  # 0.1 of the old and 0.9 of the new, shared or not
        torch.testing.assert_close(value, start[name] + 0.9, msg=name)
    copy_parameters(mean.module, student)
    assert torch.equal(student(images(student)), mean.module(images(student)))


class Bare(nn.Module):
    """A model of one block that knows neither drop path nor checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"drop_path": 0.1}, "--drop-path 0.1: the blocks of bare have no drop path."),
        ({"grad_checkpointing": True}, "--grad-checkpointing: bare cannot do it."),
    ],
)
def test_what_a_student_cannot_do(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_student(Bare(), ["block"], DistillRecipe(**asked), name="bare")
    assert message in str(caught.value)
    check_student(tiny(), BLOCKS, DistillRecipe(**asked), name="tiny")


def test_smoothing_needs_labels_to_learn_from_by_default_too() -> None:
    with pytest.raises(RecipeError, match=r"--label-smoothing 0\.1: there is no labels loss to smooth"):
        check_student(tiny(), BLOCKS, DistillRecipe(label_smoothing=0.1), name="tiny")


def test_the_learning_rate_of_a_start_in_closed_form() -> None:
    assert lr_for_start(0.0, 2.0, 16, 96) == pytest.approx(5e-5)
    assert lr_for_start(2.0, 2.0, 16, 96) == pytest.approx(5e-4)
    assert lr_for_start(1.0, 2.0, 16, 96) == pytest.approx(5e-5 * 10**0.5)
    assert lr_for_start(1.0, 2.0, 64, 96) == pytest.approx(1e-4 * 10**0.5)  # noise falls with the root of the batch
    assert lr_for_start(50.0, 2.0, 16, 96) == pytest.approx(5e-4)  # worse than chance is no further away
    assert lr_for_start(0.0, 0.0, 16, 96) == pytest.approx(5e-4)  # a teacher that says the same of every image
    assert lr_for_start(2.0, 2.0, 16, 192) == pytest.approx(2.5e-4)
    assert lr_for_start(2.0, 2.0, 16, 768) == lr_for_start(2.0, 2.0, 16, 1408) == pytest.approx(1e-4)
    assert lr_for_start(2.0, 2.0, 16, 24) == pytest.approx(5e-4)


def test_a_typed_learning_rate_wins_over_the_constant() -> None:
    assert DistillRecipe(lr=3e-4).peak_lr == 3e-4
    assert DistillRecipe().peak_lr == DEFAULT_LR


@pytest.mark.filterwarnings("default")  # what torch.compile does inside itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler here")
def test_compiled_blocks_compute_the_same_and_those_that_are_read_are_read() -> None:
    """All blocks are alike, and one of them has a hook: torch must not take one for the other."""
    student, _ = compressed(tiny(depth=2), share=2)
    x = images(student)
    tap = [Tap("blocks.1.attn.qkv")]
    found = []
    for compiled in ((), BLOCKS[:2]):
        student.zero_grad()
        with tap_outputs(student, tap) as seen, compiling(student, compiled):
            out = student(x)
            (out.square().sum() + seen[0].square().sum()).backward()
        found.append((out.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
    assert all(block._compiled_call_impl is None for block in student.blocks)  # type: ignore[union-attr]
