"""Models take images of half the size for a while, and are the same afterwards."""

import copy
from typing import Any

import pytest
import torch

from tests.factories import ROWS, build, compressed, images, row_images
from vitcompress.families.view_size import half_size, taking_views, view_size_fault

FLEXIBLE = [name for name, row in ROWS.items() if row.family in ("vit", "eva")]


@pytest.mark.broad
@pytest.mark.parametrize("name", FLEXIBLE)
def test_half_the_size_gives_what_timm_gives_after_a_resize(name: str) -> None:
    row = ROWS[name]
    model: Any = build(row)
    x, full = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), row_images(row)
    assert half_size(model) == (16, 16)
    assert view_size_fault(model, (16, 16)) == ""
    resized = copy.deepcopy(model)
    resized.set_input_size(img_size=(16, 16))
    before = model(full)
    with taking_views(model, (16, 16)):
        torch.testing.assert_close(model(x), resized(x))
    assert torch.equal(model(full), before)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in FLEXIBLE])
def test_models_of_one_size_say_so(name: str) -> None:
    model = build(ROWS[name])
    assert view_size_fault(model, half_size(model)) == "its positions belong to one image size"


def test_a_size_that_the_patches_do_not_divide_is_a_fault() -> None:
    assert "divisible by patch size" in view_size_fault(build(ROWS["vit"]), (12, 12))


def test_positions_of_the_full_size_learn_from_small_images() -> None:
    student: Any = compressed(build(ROWS["vit"]), share=2)[0]
    with taking_views(student, (16, 16)):
        student(images(student)[..., ::2, ::2]).square().sum().backward()
    assert student.pos_embed.grad.shape == student.pos_embed.shape
    assert bool((student.pos_embed.grad != 0).all())
