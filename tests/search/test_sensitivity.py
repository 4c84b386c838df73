"""The cost of an option is that of the student that is built with it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from tests.factories import images, tiny
from tests.search.factories import built
from vitcompress.families.outputs import tell_outputs
from vitcompress.families.registry import family_of
from vitcompress.initialize.align import AlignedGroup, align_group
from vitcompress.initialize.start import start_group
from vitcompress.plans.make import plan_of
from vitcompress.recipe import KINDS
from vitcompress.search.build import build_student
from vitcompress.search.options import Shapes, merge, run_options, single_options
from vitcompress.search.sensitivity import Sensitivity, divergence, divergence_and_chance, shown_nats
from vitcompress.surgery import apply_groups


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["vit", "deit3", "swin", "beit", "eva02"])
def test_the_cost_of_an_option_is_that_of_the_student_run_whole(name: str) -> None:
    teacher = built(name)
    family = family_of(teacher, name)
    blocks = family.block_names(teacher)
    x = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = {k: t.clone() for k, t in teacher.state_dict().items()}
    sensitivity = Sensitivity(teacher, family, x[:6], x[6:])
    shapes = Shapes(teacher, family, blocks, KINDS, (), 3)
    options = [o for b in (blocks[0], blocks[-1]) for _, o in single_options(shapes, b)][::3] + list(
        run_options(shapes)
    )[::5]
    for option in options:
        source = copy.deepcopy(teacher)
        aligned = AlignedGroup(source, align_group(source, option.group))
        student = copy.deepcopy(source)
        apply_groups(student, [option.group], family)
        start_group(student, option.group, replace(sensitivity.calibration, cache={}), aligned)
        assert sensitivity.cost(option.group) == pytest.approx(divergence(student, teacher, x[6:]), rel=1e-3, abs=1e-6)
    assert all(torch.equal(t, before[k]) for k, t in teacher.state_dict().items())
    for module in teacher.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_a_group_made_of_two_kinds_starts_as_it_was_measured() -> None:
    """Matrices that a group shares are fitted, too, where other layers of it are factors."""
    teacher = tiny()
    with torch.no_grad():
        teacher.head.weight.mul_(100)  # type: ignore[operator, union-attr]  # or what is compared is rounding
    family = family_of(teacher, "tiny")
    blocks = family.block_names(teacher)
    x = images(teacher, 40)
    sensitivity = Sensitivity(teacher, family, x[:32], x[32:])
    options = list(run_options(Shapes(teacher, family, blocks, KINDS, (), 3)))
    for kind in ("basis", "adapter", "share"):
        for attention in [
            o for o in options if o.kind == "share" and o.part == "attn" and o.group.blocks == (*blocks,)
        ]:
            mlp = next(o for o in options if o.kind == kind and o.part == "mlp" and o.group.blocks == (*blocks,))
            group = merge(attention, mlp)
            plan = plan_of(teacher, family, [group], (), 3)
            assert sensitivity.cost(group) == pytest.approx(
                divergence(build_student(plan, teacher, x[:32]), teacher, x[32:]), rel=1e-3
            )


@pytest.mark.parametrize("kind", ["regression", "multi_label"])
def test_the_cost_is_in_the_teachers_own_kind(kind: str) -> None:
    teacher = tiny(num_classes=1)
    tell_outputs(teacher, kind, name="tiny")
    with torch.no_grad():
        teacher.head.weight.mul_(100)  # type: ignore[operator, union-attr]  # or what is compared is rounding
    family = family_of(teacher, "tiny")
    x = images(teacher, 12)
    sensitivity = Sensitivity(teacher, family, x[:6], x[6:])
    group = next(run_options(Shapes(teacher, family, family.block_names(teacher), KINDS, (), 3))).group
    source = copy.deepcopy(teacher)
    aligned = AlignedGroup(source, align_group(source, group))
    student = copy.deepcopy(source)
    apply_groups(student, [group], family)
    start_group(student, group, replace(sensitivity.calibration, cache={}), aligned)
    with torch.no_grad():
        p, q = teacher(x[6:]).double(), student(x[6:]).double()
    if kind == "regression":
        expected = ((p - q).square() / p.var(correction=0) / 2).mean()
    else:
        expected = kl_divergence(Bernoulli(logits=p), Bernoulli(logits=q)).mean()
    assert sensitivity.cost(group) == pytest.approx(expected.item(), rel=1e-2)
    cost, chance = divergence_and_chance(student, teacher, x[6:])
    assert cost == pytest.approx(expected.item(), rel=1e-2)
    assert 0 < chance <= 0.5 + 1e-6
    assert kind != "regression" or chance == pytest.approx(0.5, rel=1e-4)


def test_a_small_cost_is_not_shown_as_zero() -> None:
    assert [shown_nats(cost) for cost in (0.0, 0.00004, 1.23456)] == ["0.000 nats", "4e-05 nats", "1.235 nats"]


def test_what_was_kept_of_blocks_is_freed() -> None:
    teacher = tiny()
    family = family_of(teacher, "tiny")
    blocks = family.block_names(teacher)
    x = images(teacher, 8)
    sensitivity = Sensitivity(teacher, family, x[:4], x[4:])
    shapes = Shapes(teacher, family, blocks, KINDS, (), 3)
    costs = [sensitivity.cost(o.group) for _, o in single_options(shapes, blocks[0])] + [
        sensitivity.cost(next(run_options(shapes)).group)
    ]
    assert sensitivity.calibration.cache
    sensitivity.drop_moments(blocks[:2])
    assert not sensitivity.calibration.cache
    assert sensitivity.cost(next(run_options(shapes)).group) == pytest.approx(costs[-1])
