"""Starts of shared matrices: the donor, the mean, and the least-squares fit."""

import pytest
import torch

from tests.factories import ROWS, build, compressed, images, tiny
from vitcompress.families.registry import family_named
from vitcompress.initialize.factors import input_moments
from vitcompress.initialize.shared_matrices import (
    STARTS,
    shared_layers,
    shared_matrix,
    start_calibrated,
    start_first,
    start_mean,
)
from vitcompress.plans.model import Group


def test_first_leaves_the_donors_weights() -> None:
    teacher = tiny()
    student, plan = compressed(teacher, share=2)
    start_first(student, teacher, plan, list)
    assert torch.equal(
        student.get_parameter("blocks.2.mlp.fc1.weight"), teacher.get_parameter("blocks.2.mlp.fc1.weight")
    )


def test_mean_is_the_mean_of_each_group() -> None:
    teacher = tiny()
    student, plan = compressed(teacher, share=2)
    start_mean(student, teacher, plan, list)
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        each = [teacher.get_parameter(f"blocks.{i}.{layer}.weight") for i in (2, 3)]
        torch.testing.assert_close(student.get_parameter(f"blocks.3.{layer}.weight"), (each[0] + each[1]) / 2)


def test_every_start_of_groups_of_one_is_the_teacher() -> None:
    teacher = tiny()
    x = images(teacher, 4)
    for start in STARTS.values():
        student, plan = compressed(teacher, share=1)
        start(student, teacher, plan, lambda: [x])
        torch.testing.assert_close(student(x), teacher(x), atol=1e-5, rtol=1e-5)


def _layer_error(share_biases: bool, layer: str, start: str) -> float:
    """Σ over blocks of E‖student's layer − teacher's layer‖² on the teacher's inputs."""
    teacher = tiny().double()
    student, plan = compressed(teacher, share=4, share_biases=share_biases)
    x = images(teacher, 64).double()
    STARTS[start](student, teacher, plan, lambda: [x[:32], x[32:]])
    inputs: dict[str, torch.Tensor] = {}
    for i in range(4):
        module = teacher.get_submodule(f"blocks.{i}.{layer}")
        module.register_forward_hook(lambda m, args, out, i=i: inputs.__setitem__(str(i), args[0]))
    teacher(x)
    return sum(
        float(
            (student.get_submodule(f"blocks.{i}.{layer}")(v) - teacher.get_submodule(f"blocks.{i}.{layer}")(v))
            .square()
            .sum(-1)
            .mean()
            .detach()
        )
        for i, v in inputs.items()
    )


@pytest.mark.thorough
def test_calibrated_fits_every_layer_better_than_the_other_starts() -> None:
    for share_biases in (False, True):
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            best = _layer_error(share_biases, layer, "calibrated")
            assert best < _layer_error(share_biases, layer, "mean")
            assert best < _layer_error(share_biases, layer, "first")


def test_calibrated_is_least_squares() -> None:
    """Against numpy's solver on the stacked, centred inputs of one layer, in float64."""
    import numpy as np

    teacher = tiny().double()
    student, plan = compressed(teacher, share=4)
    x = images(teacher, 256).double()
    inputs: list[torch.Tensor] = []
    for i in range(4):
        module = teacher.get_submodule(f"blocks.{i}.attn.proj")
        module.register_forward_hook(lambda m, args, out: inputs.append(args[0].flatten(0, 1)))
    start_calibrated(student, teacher, plan, lambda: [x])
    centred = [v - v.mean(0) for v in inputs]
    targets = [c @ teacher.get_parameter(f"blocks.{i}.attn.proj.weight").T for i, c in enumerate(centred)]
    expected, *_ = np.linalg.lstsq(torch.cat(centred).detach().numpy(), torch.cat(targets).detach().numpy())
    found = student.get_parameter("blocks.0.attn.proj.weight").detach().numpy()
    assert np.abs(found - expected.T).max() < 1e-3 * np.abs(expected).max()


def test_calibration_leaves_no_hook_behind() -> None:
    teacher = tiny()
    student, plan = compressed(teacher, share=2)
    start_calibrated(student, teacher, plan, lambda: [images(teacher)])
    assert not any(module._forward_pre_hooks for module in teacher.modules())


@pytest.mark.parametrize("row", ["vit", "beit", "swin"])
def test_a_shared_matrix_alone_is_that_of_the_whole_start(row: str) -> None:
    teacher, x = build(ROWS[row]), torch.randn(16, 3, *ROWS[row].image, generator=torch.Generator().manual_seed(1))
    student, plan = compressed(teacher, share=2)
    start_calibrated(student, teacher, plan, lambda: [x])
    group, family = plan.groups[-1], family_named(plan.family)
    layers = shared_layers(group, family)
    assert len(layers) == 4
    moments = input_moments(teacher, [Group(group.blocks, (), dict.fromkeys(layers, 1))], [x])
    for layer in layers:
        weights = {block: teacher.get_parameter(f"{block}.{layer}.weight").detach().double() for block in group.blocks}
        has_bias = getattr(teacher.get_submodule(f"{group.donor}.{layer}"), "bias", None) is not None
        found_moments = {block: moments[f"{block}.{layer}"] for block in group.blocks}
        inputs = {block: m.centered() if has_bias else m.uncentered() for block, m in found_moments.items()}
        found = shared_matrix(weights, inputs, {block: weights[block] @ inputs[block] for block in group.blocks})
        expected = student.get_parameter(f"{group.donor}.{layer}.weight").double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
