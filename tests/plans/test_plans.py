"""Plans from recipes: groups, published sizes, and errors."""

from typing import Any

import pytest

from tests.factories import VARIANTS, compressed, tiny
from vitcompress.errors import PlanError
from vitcompress.pipeline import plan as pipeline
from vitcompress.plans.make import make_plan
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.resolve import resolve
from vitcompress.recipe import ModelRecipe, PlanRecipe

PUBLISHED = {"share_biases": True, "transforms": ()}


def arithmetic(dim: int, share: int, *, depth: int = 12, classes: int = 1000, patches: int = 196) -> int:
    """Parameters of a DeiT whose groups share matrices and biases, without transformations."""
    embed = (16 * 16 * 3 + 1) * dim + (patches + 1) * dim + dim
    block = 12 * dim * dim + 9 * dim  # qkv, proj, fc1, fc2, with biases
    return embed + -(-depth // share) * block + depth * 4 * dim + 2 * dim + (dim + 1) * classes


@pytest.mark.parametrize(
    ("model", "share", "expected"),
    [
        ("deit_base", 12, 8_634_856),
        ("deit_base", 2, 44_058_856),
        ("deit_base", 1, 86_567_656),
        ("deit_tiny", 1, 5_717_416),
        ("deit_tiny", 12, arithmetic(192, 12)),
        ("deit_tiny", 2, arithmetic(192, 2)),
        ("deit_small", 12, arithmetic(384, 12)),
        ("deit_small", 5, arithmetic(384, 5)),
    ],
)
def test_published_sharing_leaves_the_published_parameters(model: str, share: int, expected: int) -> None:
    size = pipeline.plan(ModelRecipe(model), PlanRecipe(share=share, **PUBLISHED)).size  # type: ignore[arg-type]
    assert size.student_params == expected
    assert size.student_bytes == 4 * expected


def test_default_transformations_keep_the_ratio() -> None:
    size = pipeline.plan(ModelRecipe("deit_base"), PlanRecipe(share=12)).size
    assert size.params_ratio >= 9.7
    assert size.teacher_params == 86_567_656


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "recipe",
    [
        {"share": 1},
        {"share": 1, "transforms": ("heads", "mlp")},
        {"share": 2},
        {"share": 3, "share_biases": True},
        {"share": 4, "transforms": ()},
    ],
    ids=str,
)
def test_plan_counts_what_is_built(variant: str, recipe: dict[str, Any]) -> None:
    student, plan = compressed(tiny(variant), **recipe)
    assert sum(p.numel() for p in student.parameters()) == plan.size.student_params


def groups(**recipe: Any) -> list[int]:
    return [len(group.blocks) for group in make_plan(tiny(), PlanRecipe(**recipe), name="tiny").groups]


def test_pairs_of_blocks_share_by_default_but_not_where_they_are_only_to_be_narrow() -> None:
    assert groups() == groups(width=0.5, share=2) == groups(width=0.5, pattern="cycle") == [2, 2]
    assert groups(width=0.5) == [1, 1, 1, 1]


def test_groups_are_consecutive_and_the_last_may_be_shorter() -> None:
    assert groups(share=3) == [3, 1]
    assert groups(share=4) == [4]
    assert groups() == [2, 2]
    assert groups(groups="0,1-2,3") == [1, 2, 1]
    assert groups(groups=" 0 - 3 ") == [4]


def test_norms_and_layer_scale_are_never_shared() -> None:
    plan = make_plan(tiny("layer-scale"), PlanRecipe(share=4, share_biases=True), name="tiny")
    assert set(plan.groups[0].shared) == {
        f"{layer}.{kind}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("0-1,1-3", "1-3 overlaps"),
        ("0-1,3", "3 skips block 2"),
        ("1-0,2-3", "1-0 runs backwards"),
        ("2-3,0-1", "0-1 overlaps an earlier group or is out of order"),
        ("0-4", "0-4 goes past the last block, 3"),
        ("0-2", "blocks 3-3 are in no group"),
        ("a,0-3", "'a' is not a block"),
        ("0-1,,2-3", "'' is not a block"),
    ],
)
def test_groups_that_do_not_cover_the_blocks_in_order(text: str, fault: str) -> None:
    with pytest.raises(PlanError, match="--groups") as caught:
        groups(groups=text)
    assert fault in str(caught.value)


def test_all_faults_of_the_groups_are_listed() -> None:
    with pytest.raises(PlanError) as caught:
        groups(groups="0-1,1-2,9")
    assert len(str(caught.value).splitlines()) == 3


def test_share_above_the_depth() -> None:
    with pytest.raises(PlanError, match="--share 5: the model has 4 blocks") as caught:
        groups(share=5)
    assert caught.value.hint == "Use at most --share 4."


def test_transformations_that_do_not_fit() -> None:
    with pytest.raises(PlanError, match=r"--transforms mlp.*the grid of patches is incomplete"):
        make_plan(tiny(patch_drop_rate=0.5), PlanRecipe(), name="tiny")


@pytest.mark.parametrize(
    ("name", "fault"),
    [("vit_base_patch16_xp_224", "ParallelScalingBlock have no matrices that can be shared")],
)
def test_blocks_that_cannot_share(name: str, fault: str) -> None:
    import timm

    if not timm.is_model(name):
        pytest.skip("this timm has no such model")
    with pytest.raises(PlanError, match=fault):
        make_plan(empty_model(resolve(ModelRecipe(name))), PlanRecipe(), name=name)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"share": 2}, ("heads", "mlp")),
        ({"share": 2, "adapter_rank": 2}, ("heads", "mlp")),
        ({"share": 2, "width": 0.5}, ("heads", "mlp")),
        ({"share": 1}, ()),
        ({"share": 1, "width": 0.5}, ()),
        ({"share": 4, "basis": 2, "matrices": False}, ()),
        ({"share": 4, "basis": 2, "matrices": False, "share_biases": True}, ()),
        ({"share": 1, "transforms": ("mlp",)}, ("mlp",)),
        ({"share": 2, "transforms": ()}, ()),
    ],
    ids=str,
)
def test_blocks_that_share_no_whole_matrix_have_no_transformations_by_default(
    recipe: dict[str, Any], expected: tuple[str, ...]
) -> None:
    assert make_plan(tiny(), PlanRecipe(**recipe), name="tiny").transforms == expected
