"""`--preset minivit` has the published number of parameters; other options win over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Vitcompress, model_flags
from tests.factories import compressed, images, tiny
from vitcompress.errors import RecipeError
from vitcompress.families.registry import FAMILIES
from vitcompress.pipeline import plan as pipeline
from vitcompress.plans.make import make_plan
from vitcompress.recipe import STAGES, Recipe, flag_specs
from vitcompress.recipe.compose import build, to_dict
from vitcompress.recipe.presets import PRESETS, fill

WIDTHS = {"deit_tiny": 192, "deit_small": 384, "deit_base": 768}
# Mini-DeiT's table, without class token: parameters by model and number of blocks that share
PUBLISHED = {
    "deit_tiny": {2: 3_090_304, 3: 2_202_112, 4: 1_758_016, 6: 1_313_920, 12: 869_824},
    "deit_small": {2: 11_450_824, 3: 7_904_968, 4: 6_132_040, 6: 4_359_112, 12: 2_586_184},
    "deit_base": {2: 44_098_408, 3: 29_928_808, 4: 22_844_008, 6: 15_759_208, 12: 8_674_408},
}


def named(model: str, **flags: Any) -> Recipe:
    return build({"model": model, **flags}, preset="minivit", family_name=pipeline.family_name)


def params(model: str, **flags: Any) -> int:
    recipe = named(model, **flags)
    return pipeline.plan(recipe.model, recipe.plan).size.student_params


@pytest.mark.thorough
@pytest.mark.parametrize("model", PUBLISHED)
def test_mini_deit_has_the_published_parameters_and_a_class_token(model: str) -> None:
    found = {share: params(model, share=share) for share in PUBLISHED[model]}
    assert found == {share: count + 2 * WIDTHS[model] for share, count in PUBLISHED[model].items()}


def test_the_counts_of_the_abstract() -> None:
    assert params("deit_base", share=12) == 8_675_944
    assert params("deit_base", share=2) == 44_099_944


def test_without_a_class_token_the_counts_are_the_published_ones() -> None:
    arguments = {"class_token": False, "global_pool": "avg"}
    assert params("vit_base", share=12, model_arg=arguments) == 8_674_408


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "share", "expected"),
    [("swin_tiny", 6, 11_767_645), ("swin_small", 2, 25_985_725), ("swin_base", 2, 45_804_804)],
)
def test_mini_swin_has_the_published_parameters(model: str, share: int, expected: int) -> None:
    assert params(model, share=share, transforms="none") == expected


def test_mini_swin_adds_two_head_mixes_and_a_convolution_per_block() -> None:
    """Unlike the published ones, without biases and without norms on the residual trunk."""
    blocks = [(2, 3, 96), (2, 6, 192), (6, 12, 384), (2, 24, 768)]
    added = sum(depth * (2 * heads**2 + 49 * dim) for depth, heads, dim in blocks)
    assert params("swin_tiny", share=6) == 11_767_645 + added


def test_what_the_preset_says_by_family() -> None:
    deit, swin = named("deit_tiny"), named("swinv2_tiny")
    assert deit.plan.transforms == ("heads", "rpe")
    assert (deit.plan.share_biases, deit.plan.share_tables, deit.distill.loss) == (True, False, {"logits": 1.0})
    assert (swin.plan.transforms, swin.plan.token_kernel) == (("heads", "mlp"), 7)
    assert (swin.plan.share_biases, swin.plan.share_tables) == (True, True)
    assert swin.distill.loss == {"logits": 1.0, "attention": 1.0, "hidden_relation": 0.1}


def test_with_share_1_the_student_is_the_teacher() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=1, share_biases=True, transforms=named("deit_tiny").plan.transforms)
    with torch.no_grad():
        torch.testing.assert_close(student(images(teacher)), teacher(images(teacher)), rtol=1e-4, atol=1e-5)


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "preset: minivit\nnotes: {why: a test}\nmodel: {model: swin_tiny}\n"
        "plan: {token_kernel: 5, share_biases: false}\ndistill: {loss: {hidden: 2}}\n"
    )
    recipe = build({"share": 6, "share_biases": True}, file=file, family_name=pipeline.family_name)
    assert (recipe.plan.token_kernel, recipe.plan.share_biases, recipe.plan.share_tables) == (5, True, True)
    assert recipe.distill.loss == {"hidden": 2.0}
    (tmp_path / "again.yaml").write_text(str(to_dict(recipe)).replace("None", "null"))
    assert build({}, file=tmp_path / "again.yaml") == recipe  # a resolved recipe needs no preset


def test_a_preset_says_nothing_that_is_no_field_of_a_recipe() -> None:
    fields = {(spec.stage, spec.name) for spec in flag_specs(*STAGES)}
    for by_family in PRESETS.values():
        assert by_family.keys() <= {family.name for family in FAMILIES}
        for tree in by_family.values():
            assert {(stage, name) for stage, values in tree.items() for name in values} <= fields


def test_fill_keeps_what_is_said() -> None:
    filled = fill({"a": {"x": 1}, "c": {}}, {"a": {"x": 2, "y": 3}, "b": {"z": 4}})
    assert filled == {"a": {"x": 1, "y": 3}, "b": {"z": 4}, "c": {}}


def test_every_preset_of_a_family_makes_a_plan() -> None:
    for by_family in PRESETS.values():
        assert set(by_family) == {"vit", "swin", "swin_v2"}
    assert make_plan(tiny(), named("deit_tiny").plan, name="tiny").transforms == ("heads", "rpe")


@pytest.mark.parametrize("model", ["beit_base", "eva02_tiny"])
def test_a_preset_that_does_not_fit_the_family(model: str) -> None:
    with pytest.raises(RecipeError, match=r"--preset minivit does not fit the (beit|eva) family"):
        named(model)


def test_every_fault_of_a_recipe_with_a_preset_is_told_at_once(
    tmp_path: Path, vitcompress: Vitcompress, no_network: None
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("presett: minivit\nplan: {shar: 2}\nrun: {seed: -1}\n")
    out = tmp_path / "x.safetensors"
    ended = vitcompress("compress", "beit_base", "--recipe", file, "--preset", "minivit", "--out", out)
    assert (ended.code, ended.out) == (2, "")
    for line in (
        "presett: no such option (did you mean preset?)",
        "plan.shar: no such option (did you mean share?)",
        "--seed -1",
        "--preset minivit does not fit the beit family",
    ):
        assert line in ended.err
    assert not out.exists()


def test_an_unknown_preset_names_the_nearest(vitcompress: Vitcompress, no_network: None) -> None:
    ended = vitcompress("plan", "vit_tiny", *model_flags(), "--preset", "minvit", "--share", 0)
    assert (ended.code, ended.out) == (2, "")
    assert "--preset minvit: no such preset (did you mean minivit?)" in ended.err
    assert "--share 0" in ended.err


@pytest.mark.parametrize("name", ["5", "[minivit]", "{minivit: 1}"])
def test_a_preset_that_is_no_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"preset: {name}\nmodel: {{model: deit_tiny}}\n")
    with pytest.raises(RecipeError, match="no such preset"):
        build({}, file=tmp_path / "r.yaml", family_name=pipeline.family_name)


def test_a_preset_without_a_way_to_tell_the_family(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the family of the model is needed"):
        build({"model": "deit_tiny"}, preset="minivit")


def test_a_wrong_model_option_with_a_preset_is_a_fault_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r"--crop-pct 5\.0: input should be less than or equal to 1"):
        named("deit_tiny", crop_pct=5.0)


def test_plan_takes_a_preset(vitcompress: Vitcompress) -> None:
    ended = vitcompress("plan", "deit_base", "--share", 12, "--preset", "minivit")
    assert ended.code == 0
    assert "8,675,944" in ended.out
