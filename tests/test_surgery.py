"""Students that surgery makes of teachers: identities, gradients, and errors."""

import copy
import itertools

import pytest
import torch

from tests.factories import VARIANTS, compressed, images, tiny
from vitcompress.errors import PlanError
from vitcompress.plans.model import Group
from vitcompress.surgery import tie_group


@pytest.mark.parametrize("variant", VARIANTS)
def test_share_1_keeps_the_function(variant: str) -> None:
    teacher = tiny(variant)
    student, _ = compressed(teacher, share=1, transforms=("heads", "mlp"))
    x = images(teacher)
    torch.testing.assert_close(student(x), teacher(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_of_one_without_transformations_are_bit_identical(variant: str) -> None:
    teacher = tiny(variant)
    student, _ = compressed(teacher, share=1, transforms=())
    x = images(teacher)
    assert torch.equal(student(x), teacher(x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share_biases", [False, True])
def test_a_donors_gradient_is_the_sum_of_its_blocks(variant: str, share_biases: bool) -> None:
    """Compare with the same student untied, with a copy per block, in float64."""
    student, plan = compressed(tiny(variant), share=2, share_biases=share_biases)
    student.double()
    untied = copy.deepcopy(student)
    for group in plan.groups:
        for block, name in itertools.product(group.blocks, group.shared):
            owner, _, leaf = f"{block}.{name}".rpartition(".")
            setattr(untied.get_submodule(owner), leaf, torch.nn.Parameter(untied.get_parameter(f"{block}.{name}").data))
    x = images(student).double()
    for model in (student, untied):
        model(x).square().sum().backward()
    for group in plan.groups:
        for name in group.shared:
            total = sum(untied.get_parameter(f"{block}.{name}").grad for block in group.blocks)  # type: ignore[misc]
            torch.testing.assert_close(student.get_parameter(f"{group.donor}.{name}").grad, total)


def test_what_is_not_shared_stays_the_blocks_own() -> None:
    student, _ = compressed(tiny(), share=4)
    first, last = student.blocks[0], student.blocks[3]  # type: ignore[index]
    assert first.mlp.fc1.weight is last.mlp.fc1.weight  # type: ignore[union-attr]
    assert first.mlp.fc1.bias is not last.mlp.fc1.bias  # type: ignore[union-attr]
    assert first.norm1.weight is not last.norm1.weight  # type: ignore[union-attr]
    assert first.attn.mix_logits.weight is not last.attn.mix_logits.weight  # type: ignore[union-attr]


def test_the_teacher_is_left_alone() -> None:
    teacher = tiny()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    compressed(teacher, share=4)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())


def test_the_student_is_still_timms_model() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=2)
    x = images(teacher)
    final, middle = student.forward_intermediates(x, indices=[1, 3])  # type: ignore[operator]
    assert final.shape == student.forward_features(x).shape  # type: ignore[operator]
    assert [m.shape for m in middle] == [(2, 24, 4, 4)] * 2
    student.reset_classifier(7)  # type: ignore[operator]
    assert student(x).shape == (2, 7)


def test_a_block_without_head_mixing_keeps_fused_attention() -> None:
    student, _ = compressed(tiny(), share=2, transforms=("mlp",))
    assert type(student.blocks[0].attn).__name__ == "Attention"  # type: ignore[index, union-attr]


def test_blocks_of_different_shapes_cannot_share() -> None:
    model = tiny()
    model.blocks[1].mlp.fc1 = torch.nn.Linear(24, 7)  # type: ignore[index, union-attr]
    with pytest.raises(PlanError, match=r"blocks\.1\.mlp\.fc1\.weight is \(7, 24\); donor blocks\.0 has \(96, 24\)"):
        tie_group(model, Group(("blocks.0", "blocks.1"), ("mlp.fc1.weight",)))
