"""Starts of factors and narrow blocks: closed forms, identities, and what they leave unchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.factories import ROWS, build, compressed, images, tiny
from vitcompress.errors import PlanError
from vitcompress.families.narrow import full_widths, narrow_block
from vitcompress.families.registry import family_named
from vitcompress.families.vit import VIT
from vitcompress.families.widths import Widths
from vitcompress.initialize.blockwise import CHUNK_IMAGES
from vitcompress.initialize.factors import input_moments, start_factors
from vitcompress.initialize.narrow import STEPS, eliminate, fit_layer, narrow_heads
from vitcompress.initialize.regression import Moments, low_rank, regress, roots, with_ridge
from vitcompress.initialize.start import start_student
from vitcompress.plans.make import layer_shapes, make_plan, plan_of
from vitcompress.plans.model import Group, Plan
from vitcompress.recipe import PlanRecipe
from vitcompress.surgery import apply_plan

KINDS: dict[str, dict[str, Any]] = {
    "adapters": {"share": 2, "adapter_rank": 3},
    "bases on matrices": {"share": 2, "basis": 3},
    "bases": {"share": 4, "basis": 12, "matrices": False},
    "low rank": {"share": 1, "adapter_rank": 12, "matrices": False},
    "low rank of some": {"groups": "0,1-3", "adapter_rank": 12, "matrices": False},
    "in turn": {"share": 2, "pattern": "cycle", "adapter_rank": 3},
    "narrow": {"share": 1, "width": 0.5},
    "narrow and shared": {"share": 2, "width": 0.5},
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(teacher: nn.Module, x: Tensor, plan: Plan, method: str = "first") -> nn.Module:
    student = copy.deepcopy(teacher)
    apply_plan(student, plan)
    start_student(student.eval(), teacher, plan, lambda: x.split(16), method)
    return student


def of(teacher: nn.Module, x: Tensor, **recipe: Any) -> nn.Module:
    return started(teacher, x, make_plan(teacher, PlanRecipe(**recipe), name="tiny"))


def off(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    """Mean squared error of the logits, as a share of what there is to explain."""
    with torch.no_grad():
        expected = teacher(x)
        return float((student(x) - expected).square().mean() / (expected - expected.mean(0)).square().mean())


def kept_neurons(covariance: Tensor, weight: Tensor, count: int) -> Tensor:
    return next(eliminate(covariance, weight, [count]))[0]


# --- least squares


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_low_rank_loses_the_tail_of_the_whitened_singular_values(rank: int) -> None:
    weight, mixing = noise(7, 6), noise(6, 6, seed=1)
    covariance = mixing @ mixing.T
    up, down = low_rank(weight, covariance, rank)
    lost = weight - up @ down
    tail = torch.linalg.svdvals(weight @ mixing)[rank:].square().sum()  # any root of the covariance will do
    torch.testing.assert_close((lost @ covariance @ lost.T).trace(), tail, rtol=1e-8, atol=1e-8)


def test_low_rank_is_better_than_plain_truncation() -> None:
    weight, mixing = noise(7, 6), noise(6, 6, seed=1) * torch.tensor([10.0, 3, 1, 0.3, 0.1, 0.03])
    covariance = mixing @ mixing.T
    up, down = low_rank(weight, covariance, 2)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    errors = [w @ covariance @ w.T for w in (weight - up @ down, weight - (u[:, :2] * s[:2]) @ vt[:2])]
    assert errors[0].trace() < 0.9 * errors[1].trace()


def test_roots_are_roots() -> None:
    mixing = noise(5, 5)
    root, inverse = roots(mixing @ mixing.T)
    torch.testing.assert_close(root @ root, mixing @ mixing.T)
    torch.testing.assert_close(root @ inverse, torch.eye(5, dtype=torch.float64))


def test_moments_are_those_of_all_batches() -> None:
    x, y = noise(4, 9, 5).float() + 2, noise(4, 9, 3, seed=1).float()
    moments = Moments()
    for part in range(4):
        moments.add(x[part], y[part])
    samples, targets = x.flatten(0, 1).double(), y.flatten(0, 1).double()
    torch.testing.assert_close(moments.mean, samples.mean(0), rtol=1e-5, atol=1e-6)
    expected = torch.cov(samples.T, correction=0)
    torch.testing.assert_close(moments.covariance(), with_ridge(expected), rtol=1e-4, atol=1e-5)
    weight, *_ = torch.linalg.lstsq(samples - samples.mean(0), targets - targets.mean(0))
    torch.testing.assert_close(regress(moments.covariance(), moments.cross()), weight.T, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("alive", [0, 1, 3])
def test_dead_inputs_do_no_harm(alive: int) -> None:
    x = noise(50, 6)
    x[:, alive:] = 0
    moments = Moments()
    moments.add(x, noise(50, 4, seed=1))
    up, down = low_rank(noise(4, 6), moments.covariance(), 2)
    for found in (regress(moments.covariance(), moments.cross()), up @ down):
        assert torch.isfinite(found).all()
        assert found.abs().max() < 1e3
    kept = kept_neurons(moments.covariance(), noise(4, 6), 3)
    assert set(range(alive)) <= set(kept.tolist())


def test_low_rank_is_the_same_by_either_side() -> None:
    """Of a matrix with more rows than columns the inputs are looked at, else the outputs."""
    weight, mixing = noise(5, 5), noise(5, 5, seed=1)
    covariance = mixing @ mixing.T
    products = [
        up @ down
        for up, down in (
            low_rank(weight, covariance, 2),
            low_rank(torch.cat([weight, weight[:0], torch.zeros(3, 5)]), covariance, 2),
        )
    ]
    torch.testing.assert_close(products[1][:5], products[0])
    up, down = low_rank(weight, covariance, 3)
    torch.testing.assert_close(up.norm(dim=0), ((down @ covariance) * down).sum(1).sqrt())


def test_neurons_are_those_of_an_inversion_each_round() -> None:
    mixing, weight = noise(140, 140), noise(6, 140, seed=2)
    covariance = mixing @ mixing.T / 140 + torch.eye(140)
    left, outer = torch.arange(140), weight
    while len(left) > 9:
        inverse = torch.linalg.inv(covariance[left][:, left])
        count = min(140 // STEPS, len(left) - 9)
        gone = (outer.square().sum(0) / inverse.diagonal()).argsort(stable=True)[:count]
        rest = torch.tensor([i for i in range(len(left)) if i not in gone.tolist()])
        outer = outer - torch.linalg.solve(inverse[gone][:, gone], outer[:, gone].T).T @ inverse[gone]
        left, outer = left[rest], outer[:, rest]
    kept, best = next(eliminate(covariance, weight, [9]))
    assert kept.tolist() == left.tolist()
    torch.testing.assert_close(best, outer)
    torch.testing.assert_close(best, regress(covariance[kept][:, kept], (weight @ covariance)[:, kept]))


def test_what_is_left_at_one_count_does_not_depend_on_others() -> None:
    """Not even where four neurons go at once and the counts lie between."""
    mixing, weight = noise(300, 300), noise(6, 300, seed=2)
    covariance = mixing @ mixing.T / 300 + torch.eye(300)
    counts = [7, 300, 150, 151, 3, 298]
    found = list(eliminate(covariance, weight, counts))
    assert [len(kept) for kept, _ in found] == sorted(counts, reverse=True)
    for kept, best in found:
        alone_kept, alone_best = next(eliminate(covariance, weight, [len(kept)]))
        assert torch.equal(kept, alone_kept)
        assert torch.equal(best, alone_best)


def test_a_head_that_looks_at_nothing_can_be_narrowed() -> None:
    teacher = tiny()
    with torch.no_grad():
        for p in (teacher.blocks[1].attn.qkv.weight, teacher.blocks[1].attn.qkv.bias):  # type: ignore[index, union-attr]
            p[:8] = 0
    student, plan = compressed(teacher, share=1, width=0.5, transforms=())
    start_student(student, teacher, plan, lambda: [images(teacher, 8)], "first")
    assert all(p.isfinite().all() for p in student.parameters())


# --- narrow layers


def test_neurons_that_others_make_up_for_go_first() -> None:
    """Of twelve neurons six are mixtures of the others, and one of those left hardly matters."""
    own, mixture = noise(400, 6), noise(6, 6, seed=1)
    hidden = torch.cat([own, own @ mixture], dim=1)
    weight = noise(3, 12, seed=2)
    covariance = torch.cov(hidden.T, correction=0) + 1e-9 * torch.eye(12, dtype=torch.float64)
    kept = kept_neurons(covariance, weight, 6)
    fit = regress(covariance[kept][:, kept], (weight @ covariance)[:, kept])
    torch.testing.assert_close(hidden[:, kept] @ fit.T, hidden @ weight.T, rtol=1e-4, atol=1e-4)
    weight = torch.cat([weight[:, :5], 1e-3 * weight[:, 5:6]], dim=1)
    assert kept_neurons(torch.cov(own.T), weight, 5).tolist() == [0, 1, 2, 3, 4]


def test_one_neuron_less_is_the_best_of_all_choices() -> None:
    hidden, weight = noise(200, 6) @ noise(6, 6, seed=1), noise(3, 6, seed=2)
    covariance = torch.cov(hidden.T, correction=0)

    def error(kept: list[int]) -> float:
        fit = regress(covariance[kept][:, kept], (weight @ covariance)[:, kept])
        lost = weight.clone()
        lost[:, kept] -= fit
        return float((lost @ covariance @ lost.T).trace())

    each = [[neuron for neuron in range(6) if neuron != gone] for gone in range(6)]
    assert kept_neurons(covariance, weight, 5).tolist() == min(each, key=error)


def test_heads_that_have_few_channels_are_narrowed_without_loss() -> None:
    """Queries and keys have rank 3 and values rank 2, so widths of 3 and 2 lose nothing."""
    teacher = tiny().double()
    own: Any = teacher.get_submodule("blocks.0.attn")
    with torch.no_grad():
        for part, rank in ((0, 3), (1, 3), (2, 2)):
            for head in range(3):
                rows = slice(24 * part + 8 * head, 24 * part + 8 * head + 8)
                mix = noise(8, rank, seed=10 * part + head)
                own.qkv.weight[rows] = mix @ own.qkv.weight[rows][:rank]
                own.qkv.bias[rows] = mix @ own.qkv.bias[rows][:rank]
    block: Any = copy.deepcopy(teacher.get_submodule("blocks.0"))
    narrow_block(block, Widths(qk=3, v=2), VIT.narrow_attention)
    x = noise(64, 17, 24)
    q, k, attended, wanted = Moments(), Moments(), Moments(), Moments()
    seen: list[Tensor] = []
    with torch.no_grad():
        own.proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        expected = own(x)
        parts = own.qkv(x).chunk(3, dim=-1)
        for moments, value in ((q, parts[0]), (k, parts[1]), (attended, seen[0])):
            moments.add(value)
        narrow_heads(block.attn, own, q, k, attended)
        block.attn.proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        block.attn(x)
        wanted.add(seen[-1], expected)
        fit_layer(block.attn.proj, wanted, torch.ones(24, dtype=torch.float64))
        found = block.attn(x)
    assert (found - expected).square().mean() < 1e-5 * expected.var()


# --- whole models: what loses nothing is the teacher


def full_plan(teacher: nn.Module, share: int) -> Plan:
    """Narrow blocks as wide as the teacher's."""
    plan = make_plan(teacher, PlanRecipe(share=share, transforms=()), name="tiny")
    family = family_named(plan.family)
    groups = [
        Group(g.blocks, g.shared, widths=full_widths(teacher.get_submodule(g.donor), family.narrow_attention))
        for g in plan.groups
    ]
    return plan_of(teacher, family, groups, (), 3)


@pytest.mark.parametrize("variant", ["vit", "layer-scale", "registers", "qk-norm", "no-class-token", "deit-distilled"])
def test_blocks_narrowed_to_full_width_are_the_teachers(variant: str) -> None:
    teacher = tiny(variant)
    x = images(teacher, 64)
    assert off(started(teacher, x, full_plan(teacher, 1)), teacher, x) < 1e-4


def factored_plan(teacher: nn.Module, *, share: int, matrices: bool, bases: bool) -> Plan:
    """Every layer made of factors of full rank."""
    plan = make_plan(teacher, PlanRecipe(share=share, transforms=()), name="tiny")
    family, groups = family_named(plan.family), []
    for group in plan.groups:
        shapes = layer_shapes(family, teacher.get_submodule(group.donor))
        shared = group.shared if matrices else ()
        ranks = {layer: min(shape) for layer, shape in shapes.items()}
        groups.append(Group(group.blocks, shared, ranks, tuple(ranks) if bases else ()))
    return plan_of(teacher, family, groups, (), 3)


@pytest.mark.broad
@pytest.mark.parametrize("row", ["vit", "dinov2 swiglu", "swin", "swin v2", "beit", "eva02", "dinov3"])
@pytest.mark.parametrize(
    ("share", "matrices", "bases"),
    [(1, False, False), (4, True, False), (4, False, False), (4, False, True), (4, True, True)],
    ids=["low rank", "adapters", "low rank in groups", "bases", "bases on matrices"],
)
def test_factors_of_full_rank_are_the_teachers(row: str, share: int, matrices: bool, bases: bool) -> None:
    teacher, x = family_of_row(row)
    plan = factored_plan(teacher, share=share, matrices=matrices, bases=bases)
    assert off(started(teacher, x, plan), teacher, x) < 1e-3


def family_of_row(name: str, count: int = 48) -> tuple[nn.Module, Tensor]:
    """A model of `ROWS` and images for it."""
    row = ROWS[name]
    return build(row), torch.randn(count, 3, *row.image, generator=torch.Generator().manual_seed(1))


@pytest.mark.broad
@pytest.mark.parametrize("kind", ["adapters", "bases on matrices", "bases", "low rank", "narrow"])
@pytest.mark.parametrize("row", ROWS)
def test_every_family_starts(row: str, kind: str) -> None:
    """Weights are finite, the start is no worse than truncation, and no hooks are left behind."""
    teacher, x = family_of_row(row, 24)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    recipe = PlanRecipe(**KINDS[kind], transforms=())
    try:
        plan = make_plan(teacher, recipe, name=row)
    except PlanError as error:
        assert (kind, "neither a plain MLP nor plain attention" in str(error)) == ("narrow", True)  # noqa: PT017
        return
    student = started(teacher, x, plan)
    assert all(torch.isfinite(p).all() for p in student.parameters())
    truncated = copy.deepcopy(teacher)
    apply_plan(truncated, plan)
    assert off(student, teacher, x) < 1.1 * off(truncated.eval(), teacher, x)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    for model in (student, teacher):
        assert not any("forward" in vars(module) for module in model.modules())
        fused = [module for module in model.modules() if getattr(module, "qkv_bias_separate", None) is not None]
        assert model is student or not any(module.qkv_bias_separate for module in fused)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in student.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in teacher.modules())


@pytest.mark.broad
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "narrow and shared"])
@pytest.mark.parametrize("variant", ["vit", "layer-scale", "registers", "qk-norm"])
def test_a_start_is_better_than_truncation_on_images_it_has_not_seen(variant: str, kind: str) -> None:
    teacher = tiny(variant)
    x = images(teacher, 192)
    plan = make_plan(teacher, PlanRecipe(**KINDS[kind]), name="tiny")
    truncated = copy.deepcopy(teacher)
    apply_plan(truncated, plan)
    assert off(started(teacher, x[:128], plan), teacher, x[128:]) < off(truncated.eval(), teacher, x[128:])


@pytest.mark.parametrize("kind", ["narrow", "low rank", "narrow and shared", "adapters"])
def test_the_same_images_give_the_same_start_in_batches_of_any_size(kind: str) -> None:
    teacher = tiny("layer-scale")
    x = images(teacher, CHUNK_IMAGES + 9)
    plan = make_plan(teacher, PlanRecipe(**KINDS[kind]), name="tiny")
    first, again = (started(teacher, x, plan).state_dict() for _ in range(2))
    assert all(torch.equal(t, again[name]) for name, t in first.items())


def test_blocks_of_a_narrow_group_begin_with_its_firsts_layers() -> None:
    teacher = tiny("qk-norm")  # its attention is as wide as before, and keeps its own biases
    student = of(teacher, images(teacher, 32), share=2, width=0.5)
    first, second = (dict(student.get_submodule(f"blocks.{i}").named_parameters()) for i in (0, 1))
    for name in ("mlp.fc1.weight", "mlp.fc2.weight", "attn.qkv.weight"):
        assert first[name] is second[name]
    for name in ("mlp.fc1.bias", "mlp.fc2.bias"):
        assert torch.equal(first[name], second[name])
    assert torch.equal(second["attn.qkv.bias"], teacher.get_parameter("blocks.1.attn.qkv.bias"))


@pytest.mark.parametrize("kind", ["adapters", "bases", "bases on matrices"])
def test_private_biases_keep_the_mean_of_every_layer(kind: str) -> None:
    teacher = tiny()
    x = images(teacher, 32)
    student, plan = compressed(teacher, **KINDS[kind], transforms=())
    start_factors(student, teacher, plan, [x])
    moments = input_moments(teacher, plan.groups, [x])
    for name, found in moments.items():
        own, made = (model.get_submodule(name) for model in (teacher, student))
        mean = found.mean.float()
        torch.testing.assert_close(made(mean), own(mean), rtol=1e-4, atol=1e-4)


def test_rounds_fit_better_than_residuals_of_the_donors_matrix() -> None:
    """Σ_i E‖(W_i − B − U_i V_i) x_i‖², less the mean that biases take up."""
    teacher = tiny()
    x = images(teacher, 64)
    student, plan = compressed(teacher, share=4, adapter_rank=4, transforms=())
    start_factors(student, teacher, plan, [x])
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        base = teacher.get_parameter(f"blocks.0.{layer}.weight").double()
        found = simple = 0.0
        for name, moments in input_moments(teacher, plan.groups, [x]).items():
            if not name.endswith(layer):
                continue
            covariance, own = moments.covariance(), teacher.get_parameter(f"{name}.weight").double()
            up, down = low_rank(own - base, covariance, 4)
            made: Any = student.get_submodule(name)
            errors = (own - made.weight.double(), own - base - up @ down)
            found, simple = (
                so_far + float((error @ covariance @ error.T).trace().detach())
                for so_far, error in zip((found, simple), errors, strict=True)
            )
        assert found < 0.8 * simple


def test_channels_that_layer_scale_closes_do_no_harm() -> None:
    teacher = tiny("layer-scale")
    with torch.no_grad():
        for block in teacher.blocks:  # type: ignore[union-attr]
            block.ls1.gamma[:6], block.ls2.gamma[:6] = 0.0, 1e-9
    x = images(teacher, 64)
    for kind in ("narrow", "low rank"):
        student = of(teacher, x, **KINDS[kind])
        assert max(float(p.detach().abs().max()) for p in student.parameters()) < 100
        assert off(student, teacher, x) < 1
    with torch.no_grad():
        for block in teacher.blocks:  # type: ignore[union-attr]
            block.ls1.gamma.zero_()
    student = of(teacher, x, **KINDS["narrow"])
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_the_walk_never_computes_more_than_a_chunk_of_images_at_once() -> None:
    teacher = tiny()
    student, plan = compressed(teacher, share=1, width=0.5)
    seen: list[int] = []
    for model in (student, teacher):
        for name in ("mlp.act", "attn.proj"):
            for block in ("blocks.0", "blocks.3"):
                module = model.get_submodule(f"{block}.{name}")
                module.register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
    start_student(student, teacher, plan, lambda: images(teacher, 2 * CHUNK_IMAGES + 1).split(16), "first")
    assert max(seen) == CHUNK_IMAGES
