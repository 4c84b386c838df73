"""Small views come first, for student and teacher alike."""

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from tests.distill.test_loop import OF_LOGITS, train
from tests.factories import ROWS, build, compressed, images, tiny
from vitcompress.distill.matching import ComparedModel, match_models
from vitcompress.distill.small_views import small_views_first
from vitcompress.distill.student import check_student, compiling
from vitcompress.errors import RecipeError
from vitcompress.recipe import DistillRecipe

BLOCKS = [f"blocks.{i}" for i in range(4)]


def sizes_seen(model: nn.Module) -> list[int]:
    """The widths of the images that a model gets, filled as it runs."""
    seen: list[int] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if not inputs[0].is_meta:  # where models are matched
            seen.append(inputs[0].shape[-1])

    model.register_forward_pre_hook(note)
    return seen


@pytest.mark.broad
@pytest.mark.parametrize("loss", [*OF_LOGITS, "all"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_part_of_a_training_has_small_views(loss: str, accumulate: int) -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=2)
    losses = dict.fromkeys(OF_LOGITS, 1.0) if loss == "all" else {loss: 1.0}
    recipe = DistillRecipe(loss=losses, small_first=0.6)
    ours, theirs = (ComparedModel("tiny", model, (3, 32, 32)) for model in (student, teacher))
    match_models(ours, theirs, recipe)
    seen = sizes_seen(student)
    x, before = images(teacher), student(images(teacher))
    seen.clear()
    train(student, teacher, x, 5, loss=losses, small_first=0.6, accumulate=accumulate, lr=1e-3)
    assert seen == accumulate * 3 * [16] + accumulate * 2 * [32] + [32]  # the last one checks the last update
    assert not torch.equal(student(x), before)


def test_teacher_and_student_see_the_same_views() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=4)
    views: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_pre_hook(lambda module, inputs, name=name: views[name].append(inputs[0]))
    train(student, teacher, images(teacher), 4, loss={"logits": 1.0}, small_first=0.5)
    real = {name: [view for view in seen if not view.is_meta] for name, seen in views.items()}
    assert [view.shape[-1] for view in real["teacher"]] == [16, 16, 32, 32]
    assert real["student"].pop().shape[-1] == 32  # checks the last update
    for ours, theirs in zip(real["student"], real["teacher"], strict=True):
        assert torch.equal(ours, theirs)


def test_views_are_shrunk_without_aliases() -> None:
    """Antialiased: what is finer than the small grid goes, as it does when an image is resized."""
    teacher = tiny()
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 16).expand(2, 3, 32, 32)
    with small_views_first(teacher, None, 0.5) as resize:
        small = resize(checks, 0.0)
        assert small.shape == (2, 3, 16, 16)
        assert small[..., 4:-4, 4:-4].abs().max() < 0.05
        assert resize(checks, 0.5) is checks
        assert teacher(checks).shape == (2, 5)


@pytest.mark.parametrize("name", ["swin", "beit"])
def test_models_of_one_size_are_refused(name: str) -> None:
    model = build(ROWS[name])
    recipe = DistillRecipe(small_first=0.5)
    with pytest.raises(RecipeError, match=rf"--small-first 0\.5: {name} takes images of one size"):
        check_student(model, [], recipe, name=name)
    student = ComparedModel("vit", build(ROWS["vit"]), (3, 32, 32))
    with pytest.raises(RecipeError, match=rf"--small-first 0\.5: {name} takes images of one size"):
        match_models(
            student, ComparedModel(name, model, (3, 32, 32)), DistillRecipe(small_first=0.5, loss={"logits": 1})
        )


@pytest.mark.thorough
@pytest.mark.filterwarnings("default")  # warnings inside torch.compile
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler here")
def test_compiled_blocks_take_both_sizes() -> None:
    student: Any = compressed(tiny(depth=2), share=2)[0]
    x = images(student)
    found = []
    for blocks in ((), BLOCKS[:2]):
        with small_views_first(student, None, 0.5) as resize, compiling(student, blocks):
            found.append([student(resize(x, done)).detach() for done in (0.0, 0.5)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)
