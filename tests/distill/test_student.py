import shutil
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from tests.factories import compressed, images, tiny
from vitcompress.distill.hooks import tap_outputs
from vitcompress.distill.student import check_student, compiling, training_student
from vitcompress.errors import RecipeError
from vitcompress.families.base import Tap
from vitcompress.recipe import DistillRecipe

BLOCKS = [f"blocks.{i}" for i in range(4)]


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


class Bare(nn.Module):
    """A model of one block without drop path and checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"drop_path": 0.1}, "--drop-path 0.1: the blocks of bare have no drop path."),
        ({"grad_checkpointing": True}, "--grad-checkpointing: bare does not support it."),
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


@pytest.mark.thorough
@pytest.mark.filterwarnings("default")  # warnings inside torch.compile
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler here")
def test_compiled_blocks_compute_the_same_and_those_that_are_read_are_read() -> None:
    """The blocks are alike, but only one has a hook: torch must not confuse them."""
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
