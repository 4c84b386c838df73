import copy
import re
from typing import Any

import pytest
import timm
from accelerate import init_empty_weights
from torch import nn

from tests.factories import ARGS, ROWS, Row
from vitcompress.distill.hooks import ReadPoints
from vitcompress.distill.matching import ComparedModel, default_losses, match_models
from vitcompress.errors import RecipeError
from vitcompress.families.outputs import tell_outputs
from vitcompress.families.registry import family_of
from vitcompress.plans.make import make_plan
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.resolve import Source
from vitcompress.recipe import DistillRecipe, PlanRecipe
from vitcompress.surgery import apply_plan

SIZE = (3, 32, 32)
EVERYTHING = {"logits": 1.0, "hidden": 1.0, "attention": 1.0, "hidden_relation": 0.1}
RELATIONS = {"logits": 1.0, "attention": 1.0, "hidden_relation": 0.1}


def empty(name: str = "vit_tiny_patch16_224", *, size: tuple[int, int, int] = SIZE, **args: Any) -> ComparedModel:
    with init_empty_weights():
        return ComparedModel(name, timm.create_model(name, **args), size)


def vit(**args: Any) -> ComparedModel:
    size = args.get("img_size", 32)
    return empty(size=(args.get("in_chans", 3), size, size), **{**ARGS, **args})


def test_a_model_is_compared_with_itself_block_by_block() -> None:
    model = vit()
    matching = match_models(model, model, DistillRecipe(loss=EVERYTHING))
    assert matching.losses == EVERYTHING
    assert matching.student == matching.teacher
    assert matching.student.blocks == tuple(f"blocks.{i}" for i in range(4))
    assert [tap.module for taps in matching.student.qkv for tap in taps] == [f"blocks.{i}.attn.qkv" for i in range(4)]
    assert (matching.image_size, matching.notes) == (None, ())


def test_a_deeper_and_wider_teacher() -> None:
    teacher = vit(depth=8, embed_dim=48, num_heads=6)
    matching = match_models(vit(), teacher, DistillRecipe(loss=RELATIONS, layers="0:1,2:5", relation_heads=4))
    assert matching.student.blocks == ("blocks.0", "blocks.2")
    assert matching.teacher.blocks == ("blocks.1", "blocks.5")


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "convnext_atto"])
def test_a_convolutional_teacher_gives_logits_only(name: str) -> None:
    matching = match_models(vit(), empty(name, num_classes=5), DistillRecipe(loss=EVERYTHING))
    assert matching.losses == {"logits": 1.0}
    assert matching.teacher == ReadPoints()
    left_out = "hidden, attention, hidden_relation"
    assert matching.notes == (f"{name} has no blocks to compare: it gives logits only, without the losses {left_out}.",)


def test_a_teacher_of_another_size_gets_resized_views() -> None:
    matching = match_models(vit(), vit(img_size=48), DistillRecipe(loss={"logits": 1.0}))
    assert matching.image_size == (48, 48)
    assert "resized to 48×48" in matching.notes[0]
    same = vit(img_size=64, patch_size=16)  # same number of tokens as the student
    assert match_models(vit(), same, DistillRecipe(loss=RELATIONS)).image_size == (64, 64)


@pytest.mark.parametrize(
    ("teacher", "recipe", "messages"),
    [
        (vit(num_classes=7), {}, ["gives 7 outputs, vit_tiny_patch16_224 5."]),
        (vit(in_chans=1), {}, ["takes 1 channels, vit_tiny_patch16_224 3."]),
        (vit(embed_dim=48), {"loss": {"hidden": 1.0}}, ["17 tokens of width 24", "17 tokens of width 48"]),
        (
            vit(img_size=48),
            {"loss": RELATIONS},
            ["--loss attention: vit_tiny_patch16_224 has 17 tokens", "--loss hidden_relation: ", " 37 tokens"],
        ),
        (
            vit(embed_dim=48),
            {"loss": RELATIONS, "relation_heads": 16},
            ["--relation-heads 16: does not divide the width of vit_tiny_patch16_224, 24."],
        ),
        (vit(depth=6), {"layers": "1:6"}, ["--layers 1:6: 1:6 goes past the teacher's last block, 5."]),
        (vit(), {"layers": "1", "loss": {"logits": 1.0}}, ["--layers 1: no --loss compares blocks."]),
        (empty("resnet18", num_classes=5), {"loss": {"attention": 1.0}}, ["no blocks to compare"]),
        (ComparedModel("broken", nn.Identity(), SIZE), {}, ["--teacher broken"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_compared(teacher: ComparedModel, recipe: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        match_models(vit(), teacher, DistillRecipe(**recipe))
    for message in messages:
        assert message in str(caught.value)
    assert len(set(str(caught.value).splitlines())) == len(str(caught.value).splitlines())


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_every_family_can_be_compared_without_its_weights(row: Row) -> None:
    model = empty_model(Source(row.architecture, row.architecture, dict(row.args)))
    candidate = ComparedModel(row.architecture, model, (3, *row.image))
    loss = {**default_losses(model), "hidden_relation": 1.0}
    matching = match_models(candidate, candidate, DistillRecipe(loss=loss))
    assert len(matching.student.blocks) == len(family_of(model, row.architecture).block_names(model))
    assert ("attention" in loss) == ("num_kv_heads" not in row.args)
    asked = DistillRecipe(loss={**loss, "attention": 1.0})
    if "num_kv_heads" in row.args:  # queries are wider than keys
        with pytest.raises(RecipeError, match="have no q, k and v that can be read"):
            match_models(candidate, candidate, asked)
    else:
        assert all(match_models(candidate, candidate, asked).student.qkv)


@pytest.mark.parametrize("transforms", [(), ("heads",)], ids=["plain", "mixed"])
@pytest.mark.parametrize("width", [0.5, 0.99])
def test_narrow_heads_have_no_relations_to_compare(width: float, transforms: tuple[str, ...]) -> None:
    """At 0.99 no channel is removed, but they are mixtures of the teacher's channels."""
    teacher = vit()
    narrow = copy.deepcopy(teacher.model)
    apply_plan(narrow, make_plan(narrow, PlanRecipe(share=1, width=width, transforms=transforms), name="vit"))  # type: ignore[arg-type]
    student = ComparedModel("student", narrow, SIZE)
    assert match_models(student, teacher, DistillRecipe()).losses == {
        "logits": 1.0,
        "hidden": 1.0,
        "hidden_relation": 0.1,
    }
    with pytest.raises(RecipeError, match="--loss attention: blocks of student have no q, k and v") as error:
        match_models(student, teacher, DistillRecipe(loss={"attention": 1.0}))
    assert "--width" in error.value.hint


def test_factors_are_compared_as_the_matrices_they_are() -> None:
    teacher = vit()
    factored = copy.deepcopy(teacher.model)
    apply_plan(factored, make_plan(factored, PlanRecipe(share=2, adapter_rank=2), name="vit"))
    student = ComparedModel("student", factored, SIZE)
    assert (
        match_models(student, teacher, DistillRecipe()).losses == match_models(teacher, teacher, DistillRecipe()).losses
    )


HEADLESS = {"num_classes": 0}


@pytest.mark.parametrize("args", [{}, HEADLESS], ids=["classes", "headless"])
def test_the_default_loss_reads_outputs_as_what_they_are(args: dict[str, Any]) -> None:
    model = vit(**args)
    expected = {"features" if args else "logits": 1.0, "hidden": 1.0, "hidden_relation": 0.1, "attention": 1.0}
    assert match_models(model, model, DistillRecipe()).losses == expected


@pytest.mark.parametrize(
    ("student", "teacher", "loss", "message"),
    [
        (HEADLESS, HEADLESS, "logits", "--loss logits: vit_tiny_patch16_224 has no classes; its outputs are features."),
        (HEADLESS, HEADLESS, "labels", "--loss labels: vit_tiny_patch16_224 has no classes; its outputs are features."),
        ({}, {}, "features", "--loss features: the outputs of vit_tiny_patch16_224 are logits of classes."),
        (HEADLESS, {"num_classes": 24}, "features", "gives logits of classes, vit_tiny_patch16_224 features."),
        ({"num_classes": 24}, HEADLESS, "logits", "gives features, vit_tiny_patch16_224 logits of classes."),
        (HEADLESS, {**HEADLESS, "embed_dim": 48}, "features", "gives 48 outputs, vit_tiny_patch16_224 24."),
    ],
    ids=["logits of none", "labels of none", "features of logits", "headed teacher", "headless teacher", "width"],
)
def test_features_and_logits_are_not_mixed_up(
    student: dict[str, Any], teacher: dict[str, Any], loss: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        match_models(vit(**student), vit(**teacher), DistillRecipe(loss={loss: 1.0}))


def test_a_teacher_that_tells_no_kind_has_the_students() -> None:
    student, teacher = vit(), vit()
    tell_outputs(student.model, "multi_label", name="student")
    assert match_models(student, teacher, DistillRecipe()).losses["logits"] == 1
    tell_outputs(teacher.model, "regression", name="teacher")
    with pytest.raises(RecipeError, match=re.escape("gives numbers (regression), vit_tiny_patch16_224 logits of ind")):
        match_models(student, teacher, DistillRecipe())


def test_numbers_have_no_temperature() -> None:
    model = vit(num_classes=1)
    with pytest.raises(RecipeError, match="--temperature 2"):
        match_models(model, model, DistillRecipe(temperature=2.0))
    assert match_models(model, model, DistillRecipe()).losses["logits"] == 1


def test_families_teach_each_other_where_tokens_agree() -> None:
    """An EVA can teach relations to a ViT; a Swin, with its windows, cannot."""
    relations = DistillRecipe(loss=RELATIONS)
    args: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    matching = match_models(vit(), empty("eva02_tiny_patch14_224", depth=8, **args), relations)
    assert matching.teacher.blocks == tuple(f"blocks.{number}" for number in (1, 3, 5, 7))
    swin = {**args, "patch_size": 2, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    with pytest.raises(RecipeError, match="16 windows of 16 tokens"):
        match_models(vit(), empty("swin_tiny_patch4_window7_224", **swin), relations)
