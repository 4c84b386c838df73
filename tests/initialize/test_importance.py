"""What each token counts in a fit: where it is known, exactly that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch

from tests.factories import images, tiny
from vitcompress.families.outputs import tell_outputs
from vitcompress.families.registry import family_of
from vitcompress.initialize.importance import FLOOR, token_weights
from vitcompress.initialize.regression import Moments
from vitcompress.initialize.start import start_student
from vitcompress.plans.make import make_plan
from vitcompress.recipe import PlanRecipe
from vitcompress.surgery import apply_plan

BLOCKS = ("blocks.0", "blocks.3")


def weights_of(model: torch.nn.Module, count: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    return token_weights(model, family_of(model, "tiny"), BLOCKS, [images(model, count)])


def test_only_the_class_token_counts_where_nothing_else_is_read() -> None:
    found = weights_of(tiny())
    tokens = 17
    expected = torch.full((tokens,), FLOOR, dtype=torch.double)
    expected[0] += (1 - FLOOR) * tokens
    for layer in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        torch.testing.assert_close(found["blocks.3"][layer], expected)
    assert (found["blocks.3"]["attn.qkv"][1:] > FLOOR).all()  # the others are still attended to
    assert (found["blocks.0"]["mlp.fc2"] > FLOOR).all()


def test_the_size_of_batches_changes_nothing() -> None:
    model, x = tiny(), images(tiny(), 70)
    whole, small = (
        token_weights(model, family_of(model, "tiny"), BLOCKS, batches) for batches in ([x[:64]], x.split(5))
    )
    for layer, weights in whole["blocks.0"].items():
        assert torch.equal(weights, small["blocks.0"][layer])


@pytest.mark.parametrize("told", [None, "multi_label"])
def test_tokens_of_a_model_with_one_output_differ_too(told: str | None) -> None:
    """The softmax of one number has no gradient, so that all tokens would count alike."""
    model = tiny(num_classes=1)
    tell_outputs(model, told, name="tiny")
    found = weights_of(model)["blocks.3"]["mlp.fc2"]
    assert found[0] == pytest.approx(FLOOR + (1 - FLOOR) * 17)
    assert (found[1:] == FLOOR).all()


def test_all_tokens_count_alike_where_their_mean_is_read() -> None:
    found = weights_of(tiny("no-class-token", fc_norm=True))["blocks.3"]["mlp.fc2"]
    torch.testing.assert_close(found, torch.ones(16, dtype=torch.double))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_every_layer_of_every_family_has_weights_of_its_tokens(name: str) -> None:
    args: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "num_classes": 5}
    args |= (
        {"depths": (2, 2), "num_heads": (2, 2), "window_size": 4} if "swin" in name else {"depth": 2, "num_heads": 2}
    )
    torch.manual_seed(0)
    model = timm.create_model(name, **args).eval()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    family = family_of(model, name)
    blocks = family.block_names(model)
    shapes: dict[str, torch.Size] = {}
    for block in blocks:
        for layer in ("attn.proj", "mlp.fc2"):
            module = model.get_submodule(f"{block}.{layer}")
            module.register_forward_hook(lambda m, i, o, n=f"{block}.{layer}": shapes.__setitem__(n, o.shape[1:-1]))
    found = token_weights(model, family, blocks, [torch.randn(3, 3, 32, 32)])
    for block in blocks:
        for layer, weight in found[block].items():
            assert weight.mean() == pytest.approx(1)
            assert weight.min() >= FLOOR
            assert weight.shape == shapes.get(f"{block}.{layer}", weight.shape)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_without_classes_it_is_the_features_that_depend_on_tokens() -> None:
    found = weights_of(tiny(num_classes=0))["blocks.3"]["mlp.fc2"]
    assert found[0] == pytest.approx(FLOOR + (1 - FLOOR) * 17)


def test_a_sample_that_counts_twice_is_two_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, width, generator=generator) for width in (5, 4))
    weighted, repeated = Moments(), Moments()
    weighted.add(x, y, torch.tensor([2.0, 1.0, 3.0]))
    repeated.add(x[:, [0, 0, 1, 2, 2, 2]], y[:, [0, 0, 1, 2, 2, 2]])
    assert weighted.count == repeated.count == 12
    torch.testing.assert_close(weighted.covariance(), repeated.covariance(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighted.cross(), repeated.cross(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighted.mean_target, repeated.mean_target)


@pytest.mark.thorough
def test_a_narrow_start_is_nearer_where_tokens_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of a class token, which are all that is read of the last block."""
    model = tiny()
    plan = make_plan(model, PlanRecipe(share=1, width=0.5, transforms=()), name="tiny")
    x = images(model, 64)
    errors = []
    for floor in (FLOOR, 1.0):
        monkeypatch.setattr("vitcompress.initialize.importance.FLOOR", floor)
        student = copy.deepcopy(model)
        apply_plan(student, plan)
        start_student(student.eval(), model, plan, lambda: [x], "first")
        with torch.no_grad():
            errors.append(float((student.forward_features(x) - model.forward_features(x))[:, 0].square().mean()))  # type: ignore[operator]
    assert errors[0] < 0.95 * errors[1]
