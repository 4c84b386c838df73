import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Vitcompress
from tests.factories import ROWS, VARIANTS, build, compressed, images, row_images, tiny
from vitcompress.distill.fading import fade_factor, fading
from vitcompress.initialize.shared_matrices import start_mean


def test_fading_falls_from_one_to_zero() -> None:
    assert [fade_factor(done, 0.5) for done in (0.0, 0.25, 0.5, 0.9)] == [1.0, 0.5, 0.0, 0.0]
    assert fade_factor(0.0, 0.0) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share_biases", [False, True])
def test_at_first_every_block_does_what_it_did(variant: str, share_biases: bool) -> None:
    teacher = tiny(variant)
    student, plan = compressed(teacher, share=4, share_biases=share_biases)
    start_mean(student, teacher, plan, list)
    x = images(teacher)
    with fading(student, teacher, plan, 0.5) as step:
        step(0.0)
        torch.testing.assert_close(student(x), teacher(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        {"share": 2, "adapter_rank": 2},
        {"share": 2, "basis": 2},
        {"share": 4, "basis": 3, "matrices": False},
        {"share": 1, "adapter_rank": 3, "matrices": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("row", ["vit", "deit3", "swin", "swin v2", "beit", "eva", "dinov3"])
def test_factors_fade_in_from_the_whole_matrices(row: str, recipe: dict[str, Any]) -> None:
    teacher, x = build(ROWS[row]), row_images(ROWS[row])
    student, plan = compressed(teacher, **recipe, transforms=())
    with torch.no_grad(), fading(student, teacher, plan, 0.5) as step:
        step(0.0)
        expected = teacher(x)
        torch.testing.assert_close(student(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        step(0.5)
        faded = student(x)
        assert not torch.allclose(faded, expected, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(student(x), faded)


@pytest.mark.parametrize("share", [1, 2])
def test_narrow_layers_do_not_fade(share: int) -> None:
    teacher = tiny("qk-norm")  # only its MLP is narrowed; its attention fades
    student, plan = compressed(teacher, share=share, width=0.5, transforms=())
    with fading(student, teacher, plan, 0.5) as step:
        step(0.0)
        faded = {name for name, module in student.named_modules() if "forward" in vars(module)}
        assert faded == {f"blocks.{i}.attn.{layer}" for i in range(4) for layer in ("qkv", "proj")}
        assert torch.isfinite(student(images(teacher))).all()
    student, plan = compressed(tiny(), share=share, width=0.5, transforms=())
    with fading(student, teacher, plan, 0.5):
        assert not any("forward" in vars(module) for module in student.modules())


def test_in_the_end_nothing_is_left() -> None:
    teacher = tiny()
    student, plan = compressed(teacher, share=2)
    x = images(teacher)
    shared, names = student(x), set(student.state_dict())
    with fading(student, teacher, plan, 0.5) as step:
        step(0.2)
        assert not torch.equal(student(x), shared)
        step(0.5)
        assert torch.equal(student(x), shared)
        step(0.2)
        assert set(student.state_dict()) == names
    assert torch.equal(student(x), shared)
    assert not any("forward" in vars(module) for module in student.modules())
    assert torch.equal(copy.deepcopy(student)(x), shared)


def test_halfway_a_matrix_is_halfway() -> None:
    teacher = tiny().double()
    student, plan = compressed(teacher, share=4)
    x = torch.randn(3, 24, dtype=torch.float64)
    own, shared = (model.blocks[3].attn.proj for model in (teacher, student))  # type: ignore[index, union-attr]
    expected = (own(x) + shared(x)) / 2
    with fading(student, teacher, plan, 0.5) as step:
        step(0.25)
        torch.testing.assert_close(shared(x), expected + (shared.bias - own.bias) / 2)  # biases are not shared


def test_the_shared_matrix_learns_while_the_others_fade() -> None:
    teacher = tiny()
    student, plan = compressed(teacher, share=2)
    with fading(student, teacher, plan, 0.5) as step:
        step(0.1)
        student(images(teacher)).square().sum().backward()
    assert student.get_parameter("blocks.0.mlp.fc1.weight").grad is not None
    assert all(p.grad is None for p in teacher.parameters())


def test_without_a_share_nothing_is_touched() -> None:
    teacher = tiny()
    student, plan = compressed(teacher, share=2)
    with fading(student, teacher, plan, 0.0) as step:
        step(0.0)
        assert not any("forward" in vars(module) for module in student.modules())


def test_the_fading_is_told_of_once_before_training(
    teacher: list[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    words = ["--data", images, "--steps", 1, "--batch-size", 4, "--num-workers", 0, "--device", "cpu", "--no-baselines"]
    ended = vitcompress("compress", *teacher, *words, "--fade", 0.6, "--out", tmp_path / "m.safetensors")
    assert ended.err.count("During the first 60 % of training, each block's own matrices fade out") == 1
    assert ended.err.index("fade out") < ended.err.index("distil")


def test_where_nothing_is_shared_nothing_fades_and_adamw_updates_all(
    teacher: list[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    words = ["--data", images, "--steps", 1, "--batch-size", 4, "--num-workers", 0, "--device", "cpu", "--no-baselines"]
    options = ["--width", 0.5, "--fade", 0.6, "--optimizer", "muon"]
    ended = vitcompress("compress", *teacher, *words, *options, "--out", tmp_path / "m.safetensors")
    assert ended.code == 0, ended.err
    assert "fade out" not in ended.err
    assert ended.err.count("No matrices are shared, so AdamW updates all parameters, and Muon none.") == 1
