"""What an option changes is the student's weights, built for it alone, less the teacher's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.factories import ROWS, build, tiny
from tests.search.factories import lively, noise, shapes_of
from vitcompress.families.widths import Widths
from vitcompress.initialize.align import align_model
from vitcompress.initialize.factors import input_moments
from vitcompress.initialize.importance import token_weights
from vitcompress.initialize.inputs import run_recorded
from vitcompress.initialize.regression import Moments
from vitcompress.plans.make import layer_shapes, plan_of
from vitcompress.plans.model import Group
from vitcompress.search.changes import QK, LayerChanges, block_changes, run_changes
from vitcompress.search.moments import block_moments
from vitcompress.search.options import Option, Shapes, run_options, single_options
from vitcompress.search.progress import Part, State
from vitcompress.search.student import build_student

BLOCK = "blocks.1"
X = noise(32)


def moments_of(model: nn.Module, shapes: Shapes, *blocks: str) -> dict[str, dict[str, Moments]]:
    weights = token_weights(model, shapes.family, blocks, [X])
    state = State([Part(0, blocks)], [torch.zeros(0)])
    block_moments(state, model, shapes.family, X, weights, lambda count: None)
    assert state.num_fitted == len(X)
    return state.moments


def changes_of(model: nn.Module, scale: str) -> tuple[list[Option], dict[str, LayerChanges], dict[str, Moments]]:
    """The options of one scale, what they change in `BLOCK`, and the moments behind that."""
    shapes = shapes_of(model, ("narrow", "low_rank", "skip"))
    options = [option for option in single_options(shapes, BLOCK) if option.scale == scale]
    moments = moments_of(model, shapes, BLOCK)[BLOCK]
    block = model.get_submodule(BLOCK)
    return options, block_changes(block, list(enumerate(options)), moments, []), moments


def student_with(model: nn.Module, group: Group) -> Any:
    """The group's first block in a student that differs from the model in this group alone."""
    shapes = shapes_of(model)
    rest = [Group((block,), ()) for block in shapes.blocks if block not in group.blocks]
    plan = plan_of(model, shapes.family, [group, *rest], (), 3)
    return build_student(plan, model, X).get_submodule(group.donor)


def close(found: Tensor, expected: Tensor, *, error: float = 0.01) -> None:
    """bfloat16 rounds to 0.4 % at most."""
    found, expected = found.detach().double(), expected.detach().double()
    assert (found - expected).norm() <= error * expected.norm(), float((found - expected).norm() / expected.norm())


def inputs_of(model: nn.Module, layer: str) -> Tensor:
    rows: list[Tensor] = []
    run_recorded(model, [X], [f"{BLOCK}.{layer}"], lambda name, call: rows.append(call.input))
    return rows[0].double()


@pytest.mark.parametrize("variant", ["vit", "layer-scale"])
def test_fewer_neurons_are_fitted_to_what_all_of_them_wrote(variant: str) -> None:
    model = lively(variant=variant, embed_dim=48)
    options, changes, moments = changes_of(model, "mlp.hidden")
    assert list(changes) == ["mlp.fc2"]
    assert changes["mlp.fc2"].numbers.tolist() == list(range(len(options)))
    teacher: Any = model.get_submodule(BLOCK).mlp
    weight = teacher.fc2.weight.double()
    tokens = token_weights(model, shapes_of(model).family, [BLOCK], [X])[BLOCK]["mlp.fc2"]
    hidden = inputs_of(model, "mlp.fc2")
    hidden = (hidden - moments["mlp.fc2"].mean) * tokens.sqrt()[:, None]
    for number in (0, len(options) // 2, len(options) - 1):
        change = changes["mlp.fc2"].weights[number]
        student = student_with(model, options[number].group).mlp
        kept = torch.cdist(student.fc1.weight, teacher.fc1.weight).argmin(1)
        expected = torch.zeros_like(weight)
        expected[:, kept] = student.fc2.weight.double()
        close(change, expected - weight)
        # and this is least squares on the neurons that are left
        rows, targets = hidden[..., kept].flatten(0, 1), (hidden @ weight.T).flatten(0, 1)
        best, *_ = torch.linalg.lstsq(rows, targets)
        errors = [(rows @ w - targets).square().mean() for w in (best, student.fc2.weight.double().T)]
        assert errors[1] < 1.02 * errors[0] + 1e-4 * targets.square().mean()


@pytest.mark.parametrize("variant", ["vit", "layer-scale"])
def test_narrow_values_are_the_students_maps_and_projection(variant: str) -> None:
    model = lively(variant=variant, embed_dim=48)
    options, changes, _ = changes_of(model, "attn.v")
    assert list(changes) == ["attn.proj"]
    teacher: Any = model.get_submodule(BLOCK).attn
    for number, option in enumerate(options):
        student = student_with(model, option.group).attn
        own, narrow = teacher.qkv.weight[96:].double().unflatten(0, (3, 16)), student.qkv.weight[96:].double()
        maps = [rows @ torch.linalg.pinv(w) for w, rows in zip(own, narrow.unflatten(0, (3, -1)), strict=True)]
        product = student.proj.weight.double() @ torch.block_diag(*maps)
        close(changes["attn.proj"].weights[number], product - teacher.proj.weight, error=0.02)


def test_narrow_queries_and_keys_change_their_products() -> None:
    model = lively(embed_dim=48)
    options, changes, _ = changes_of(model, "attn.qk")
    assert list(changes) == [QK]
    teacher: Any = model.get_submodule(BLOCK).attn
    tokens = inputs_of(model, "attn.qkv")
    q, k = (x.unflatten(-1, (3, 16)) for x in teacher.double().qkv(tokens)[..., :96].chunk(2, -1))
    teacher.float()
    for number, option in enumerate(options):
        width = 3 * option.dial
        student = student_with(model, option.group).attn.double()
        few_q, few_k = (x.unflatten(-1, (3, -1)) for x in student.qkv(tokens)[..., : 2 * width].split(width, -1))
        change = changes[QK].weights[number].double()
        expected = torch.einsum("bnhd,bmhd->bhnm", few_q, few_k) - torch.einsum("bnhd,bmhd->bhnm", q, k)
        close(torch.einsum("bnhd,hde,bmhe->bhnm", q, change, k), expected, error=0.03)


@pytest.mark.parametrize("variant", ["vit", "layer-scale"])
@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_low_rank_is_the_product_of_the_students_factors(layer: str, variant: str) -> None:
    model = lively(variant=variant)
    options, changes, _ = changes_of(model, f"{layer.partition('.')[0]}.rank")
    teacher = model.get_submodule(BLOCK).get_submodule(layer).weight
    for number in (0, len(options) - 1):
        group = Group((BLOCK,), (), {layer: options[number].dial})
        student: Any = student_with(model, group).get_submodule(layer)
        close(changes[layer].weights[number], student.weight - teacher, error=0.03)


@pytest.mark.parametrize("name", ["beit", "eva02", "swin"])
def test_layers_with_and_without_biases_of_other_families_are_factored_so_too(name: str) -> None:
    model = build(ROWS[name])
    shapes = shapes_of(model, ("low_rank",))
    block = shapes.blocks[1]
    options = [option for option in single_options(shapes, block) if option.scale == "attn.rank"]
    moments = moments_of(model, shapes, block)[block]
    changes = block_changes(model.get_submodule(block), list(enumerate(options)), moments, [])
    for layer in [n for n in layer_shapes(shapes.family, model.get_submodule(block)) if n.startswith("attn.")]:
        if shapes.family.writes.fullmatch(layer):
            continue  # fitted to targets, as tested above
        student: Any = student_with(model, Group((block,), (), {layer: options[-1].dial})).get_submodule(layer)
        teacher = model.get_submodule(block).get_submodule(layer).weight
        close(changes[layer].weights[-1], student.weight - teacher, error=0.03)


@pytest.mark.parametrize(("part", "layer"), [("attn", "attn.proj"), ("mlp", "mlp.fc2")])
def test_a_part_that_is_skipped_writes_nothing(part: str, layer: str) -> None:
    model = tiny()
    options, changes, _ = changes_of(model, f"{part}.skip")
    assert (len(options), list(changes)) == (1, [layer])
    assert torch.equal(changes[layer].weights[0], -model.get_parameter(f"{BLOCK}.{layer}.weight").bfloat16())


def test_changes_of_several_kinds_of_a_layer_are_joined() -> None:
    model = lively()
    shapes = shapes_of(model, ("narrow", "skip", "low_rank"))
    options = list(single_options(shapes, BLOCK))
    moments = moments_of(model, shapes, BLOCK)[BLOCK]
    other = {"mlp.fc2": LayerChanges(torch.tensor([99]), torch.ones(1, 24, 96).bfloat16())}
    changes = block_changes(model.get_submodule(BLOCK), list(enumerate(options)), moments, [other])
    scales = {"mlp.fc2": {"mlp.hidden", "mlp.rank", "mlp.skip"}, "attn.proj": {"attn.v", "attn.rank", "attn.skip"},
              "attn.qkv": {"attn.rank"}, "mlp.fc1": {"mlp.rank"}, QK: {"attn.qk"}}  # fmt: skip
    assert changes.keys() == scales.keys()
    for layer, expected in scales.items():
        numbers = changes[layer].numbers.tolist()
        assert len(numbers) == len(set(numbers)) == len(changes[layer].weights)
        assert {options[n].scale for n in numbers if n != 99} == expected
        assert [n for n in numbers if n != 99 and options[n].scale in expected].__len__() == sum(
            option.scale in expected for option in options
        )
    at = changes["mlp.fc2"].numbers.tolist().index(99)
    assert torch.equal(changes["mlp.fc2"].weights[at], torch.ones(24, 96).bfloat16())


def run_student(model: nn.Module, group: Group) -> tuple[nn.Module, nn.Module]:
    """The aligned teacher and the student of a plan that differs from it in one run."""
    shapes = shapes_of(model)
    rest = [Group((block,), ()) for block in shapes.blocks if block not in group.blocks]
    plan = plan_of(model, shapes.family, [group, *rest], (), 3)
    return align_model(model, plan), build_student(plan, model, X)


def plain_moments(model: nn.Module, shapes: Shapes, blocks: tuple[str, ...]) -> Mapping[str, Mapping[str, Moments]]:
    """As the start of shared matrices computes them: all tokens count alike."""
    layers = {block: list(layer_shapes(shapes.family, model.get_submodule(block))) for block in blocks}
    groups = [Group((block,), (), dict.fromkeys(names, 1)) for block, names in layers.items()]
    found = input_moments(model, groups, [X])
    return {block: {layer: found[f"{block}.{layer}"] for layer in names} for block, names in layers.items()}


@pytest.mark.parametrize("kind", ["share", "basis"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_what_blocks_share_is_what_the_start_gives_them(part: str, kind: str) -> None:
    model = lively(embed_dim=48)
    shapes = shapes_of(model, (kind,))
    options = [o for o in run_options(shapes) if o.scale == f"{part}.{kind}" and len(o.group.blocks) == 4]
    assert options
    for option in options:
        aligned, student = run_student(model, option.group)
        moments = plain_moments(aligned, shapes, option.group.blocks)
        changes = run_changes(aligned, shapes.family, [(5, option)], moments)
        assert changes.keys() == set(option.group.blocks)
        for block, by_layer in changes.items():
            assert {layer.partition(".")[0] for layer in by_layer} == {part}
            for layer, change in by_layer.items():
                assert change.numbers.tolist() == [5]
                made: Any = student.get_submodule(f"{block}.{layer}")
                close(change.weights[0], made.weight - aligned.get_parameter(f"{block}.{layer}.weight"), error=0.02)


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_adapters_are_the_best_factors_beside_the_shared_matrix(part: str) -> None:
    model = lively(embed_dim=48)
    shapes = shapes_of(model, ("share", "adapter"))
    runs = [o for o in run_options(shapes) if o.part == part and len(o.group.blocks) == 4]
    aligned, student = run_student(model, next(o for o in runs if o.kind == "share").group)
    moments = plain_moments(aligned, shapes, runs[0].group.blocks)
    numbered = list(enumerate(runs))
    for block, by_layer in run_changes(aligned, shapes.family, numbered, moments).items():
        for layer, change in by_layer.items():
            assert change.numbers.tolist() == list(range(len(runs)))
            weight = aligned.get_parameter(f"{block}.{layer}.weight").double()
            shared = student.get_parameter(f"{block}.{layer}.weight").double()
            root = torch.linalg.cholesky(moments[block][layer].covariance())
            u, s, vt = torch.linalg.svd((weight - shared) @ root, full_matrices=False)
            for number, option in numbered:
                rank = option.dial if option.kind == "adapter" else 0
                best = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)
                close(change.weights[number], shared + best - weight, error=0.02)


def test_rounds_of_a_start_fit_a_little_better_than_what_is_counted_on() -> None:
    model = lively(embed_dim=48)
    shapes = shapes_of(model, ("adapter",))
    option = next(o for o in run_options(shapes) if o.scale == "mlp.adapter" and len(o.group.blocks) == 4)
    aligned, student = run_student(model, option.group)
    moments = plain_moments(aligned, shapes, option.group.blocks)
    counted = built = 0.0
    for block, by_layer in run_changes(aligned, shapes.family, [(0, option)], moments).items():
        for layer, change in by_layer.items():
            covariance = moments[block][layer].covariance()
            made: Any = student.get_submodule(f"{block}.{layer}")
            for number, lost in enumerate(
                (change.weights[0].double(), (made.weight - aligned.get_parameter(f"{block}.{layer}.weight")).double())
            ):
                error = float((lost @ covariance @ lost.T).trace().detach())
                counted, built = counted + error * (number == 0), built + error * (number == 1)
    assert 0.5 * counted < built < counted


def test_the_teachers_blocks_are_left_alone() -> None:
    model = lively()
    before = copy.deepcopy(model.state_dict())
    for scale in ("mlp.hidden", "attn.v", "attn.qk", "mlp.rank", "attn.rank", "mlp.skip"):
        changes_of(model, scale)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert shapes_of(model).keep([BLOCK]).group.widths == Widths()
