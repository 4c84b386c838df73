"""Scores are directional derivatives of the outputs, and their square is the divergence."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.factories import ROWS, Row, build
from tests.search.factories import built, lively, noise
from vitcompress.families.outputs import deviation_of, outputs_of, tell_outputs
from vitcompress.families.registry import family_of
from vitcompress.plans.make import layer_shapes
from vitcompress.search.changes import QK, LayerChanges
from vitcompress.search.evidence import DIRECTIONS, add_scores, nats_of
from vitcompress.search.progress import Part, State

Changes = Mapping[str, Mapping[str, LayerChanges]]


def layers_of(model: nn.Module) -> dict[str, list[str]]:
    family = family_of(model, "tiny")
    return {b: list(layer_shapes(family, model.get_submodule(b))) for b in family.block_names(model)}


def random_changes(model: nn.Module) -> tuple[dict[str, dict[str, LayerChanges]], dict[str, Tensor]]:
    """Two options, of every other layer and of all; and mean inputs of layers with a bias."""
    draw, changes, means = torch.Generator().manual_seed(2), dict[str, dict[str, LayerChanges]](), dict[str, Tensor]()
    for block, layers in layers_of(model).items():
        changes[block] = {}
        for number, layer in enumerate(layers):
            linear: Any = model.get_submodule(f"{block}.{layer}")
            numbers = torch.tensor([0, 1] if number % 2 else [1])
            weights = torch.randn(len(numbers), *linear.weight.shape, generator=draw)
            changes[block][layer] = LayerChanges(numbers, (weights * linear.weight.detach().std()).bfloat16())
            if linear.bias is not None:
                means[f"{block}.{layer}"] = torch.randn(linear.in_features, generator=draw, dtype=torch.double)
    return changes, means


def changed(model: nn.Module, changes: Changes, means: Mapping[str, Tensor], number: int, size: float) -> nn.Module:
    """A copy in float64 whose layers are changed as an option does, times `size`."""
    made = copy.deepcopy(model).double()
    with torch.no_grad():
        for block, layers in changes.items():
            for layer, change in layers.items():
                for at in (change.numbers == number).nonzero().flatten().tolist():
                    weight = size * change.weights[at].double()
                    if layer == QK:
                        _change_queries(made.get_submodule(f"{block}.attn"), weight)
                        continue
                    linear: Any = made.get_submodule(f"{block}.{layer}")
                    linear.weight += weight
                    if linear.bias is not None:
                        linear.bias -= weight @ means[f"{block}.{layer}"].double()
    return made


def _change_queries(attn: Any, change: Tensor) -> None:
    """q·k becomes q·(1 + E)·k, in place."""
    heads, dim = change.shape[:2]
    for name in ("weight", "bias"):
        queries = getattr(attn.qkv, name)[: heads * dim].unflatten(0, (heads, dim))
        queries += torch.einsum("hde,hd...->he...", change, queries)


def derivatives(model: nn.Module, changes: Changes, means: Mapping[str, Tensor], number: int, x: Tensor) -> Tensor:
    """Change of the outputs per size of an option's change, `[N, K]`."""
    size = 1e-5
    with torch.no_grad():
        one, other = (changed(model, changes, means, number, s)(x.double()) for s in (size, -size))
    slope: Tensor = (one - other) / (2 * size)
    return slope


def directions(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The random directions that `add_scores` draws for one chunk of images."""
    kind, generator = outputs_of(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        outputs = model(x).float()
    deviation = deviation_of(outputs) if kind.uses_deviation else torch.ones(1)
    leaf = outputs.requires_grad_()
    return [torch.autograd.grad(kind.score(leaf, deviation, generator), leaf)[0] for _ in range(DIRECTIONS)]


@pytest.fixture(autouse=True)
def bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in fp32, unless a test asks for bf16: errors of a thousandth count."""
    enabled = getattr(request, "param", False)
    monkeypatch.setattr("vitcompress.search.evidence.is_faster_in_bf16", lambda device: enabled)


def scores_of(model: nn.Module, changes: Changes, means: Mapping[str, Tensor], x: Tensor, count: int = 2) -> Tensor:
    state, told = State([Part(0, tuple(changes))], [torch.zeros(DIRECTIONS * len(x), count)]), list[int]()
    add_scores(state, model, changes, means, x, told.append)
    assert sum(told) == state.num_judged == len(x)
    return state.scores[0]


FAMILIES = (
    "vit", "deit3", "dinov2 swiglu", "beit", "beit no biases", "eva02", "eva02 split", "dinov3", "swin", "swin padded",
    "swin v2",
)  # fmt: skip


@pytest.mark.broad
@pytest.mark.parametrize("name", FAMILIES)
def test_a_score_is_the_derivative_of_the_outputs_along_a_direction(name: str) -> None:
    row: Row = ROWS[name]
    model, x = build(row), noise(3, row.image[0])
    before = {key: t.clone() for key, t in model.state_dict().items()}
    changes, means = random_changes(model)
    assert means or name == "beit no biases"
    scores = scores_of(model, changes, means, x)
    for number in (0, 1):
        slope = derivatives(model, changes, means, number, x)
        expected = torch.cat([(direction.double() * slope).sum(-1) for direction in directions(model, x)])
        error = (scores[:, number].double() - expected).norm() / expected.norm()
        assert error < 2e-3, (number, error)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_score_of_queries_and_keys_is_the_derivative_too() -> None:
    model, x = lively(), noise(3)
    draw = torch.Generator().manual_seed(3)
    changes = {
        f"blocks.{n}": {QK: LayerChanges(torch.tensor([n % 2]), torch.randn(1, 3, 8, 8, generator=draw).bfloat16())}
        for n in range(4)
    }
    scores = scores_of(model, changes, {}, x)
    for number in (0, 1):
        slope = derivatives(model, changes, {}, number, x)
        expected = torch.cat([(direction.double() * slope).sum(-1) for direction in directions(model, x)])
        torch.testing.assert_close(scores[:, number].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.norm()))


def test_scores_of_many_images_are_those_of_each_and_add_up_over_calls() -> None:
    model, x = lively(), noise(19)
    changes, means = random_changes(model)
    whole = scores_of(model, changes, means, x)
    blocks = list(changes)
    again = State([Part(0, tuple(blocks))], [whole.clone()])
    add_scores(again, model, changes, means, x, lambda count: None)
    torch.testing.assert_close(again.scores[0], 2 * whole)
    halves = sum(scores_of(model, {b: changes[b] for b in part}, means, x) for part in (blocks[:1], blocks[1:]))
    torch.testing.assert_close(halves, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("told", ["classes", "multi_label", "regression"])
def test_half_the_mean_square_is_the_divergence_of_small_changes(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitcompress.search.evidence.DIRECTIONS", 64)
    model, x, size = lively(num_classes=3), noise(32), 1e-2
    tell_outputs(model, told, name="tiny")
    changes, means = random_changes(model)
    state = State([Part(0, tuple(changes))], [torch.zeros(64 * len(x), 2)])
    add_scores(state, model, changes, means, x, lambda count: None)
    kind = outputs_of(model)
    assert kind.nats is not None
    with torch.no_grad():
        teacher = copy.deepcopy(model).double()(x.double())
    for number in (0, 1):
        with torch.no_grad():
            student = changed(model, changes, means, number, size)(x.double())
        nats = float(kind.nats(student, teacher, deviation_of(teacher).double()).mean())
        predicted = float((size * state.scores[0][:, number].double()).square().mean() / 2)
        assert predicted == pytest.approx(nats, rel=0.12), number


def test_means_are_what_biases_take_up() -> None:
    """Without them, a bias that took up nothing would be counted on."""
    model, x = lively(), noise(3)
    changes, means = random_changes(model)
    with_means, without = scores_of(model, changes, means, x), scores_of(model, changes, {}, x)
    assert (with_means - without).norm() > 0.1 * without.norm()
    zero = {name: torch.zeros_like(mean) for name, mean in means.items()}
    torch.testing.assert_close(scores_of(model, changes, zero, x), without)


@pytest.mark.parametrize("bf16", [True], indirect=True)
@pytest.mark.parametrize("name", ["vit", "swin", "beit"])
def test_in_bf16_costs_are_nearly_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = lively() if name == "vit" else built(name), noise(32, ROWS[name].image[0])
    changes, means = random_changes(model)
    scores = scores_of(model, changes, means, x)
    monkeypatch.setattr("vitcompress.search.evidence.is_faster_in_bf16", lambda device: False)
    expected = scores_of(model, changes, means, x)
    assert not torch.equal(scores, expected)
    for number in (0, 1):
        assert nats_of(scores[:, number]) == pytest.approx(nats_of(expected[:, number]), rel=0.03)
