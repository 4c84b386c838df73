import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitcompress import recipe as recipes
from vitcompress.errors import RecipeError
from vitcompress.recipe import STAGES, flag_specs
from vitcompress.recipe.compose import build, from_dict, to_dict


def test_a_recipe_survives_json_and_yaml() -> None:
    recipe = build({"model": "deit_base", "share": 3, "checkpoint": "a/b.pth", "loss": ["logits=2"], "max_size": "4MB"})
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(recipe)))) == recipe


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {model: deit_small}\nplan: {groups: '0-11'}\ndistill: {epochs: 3, lr: 0.01}\n")
    recipe = build({"share": 4, "steps": 7}, file=file)
    assert recipe.model.model == "deit_small"
    assert (recipe.plan.share, recipe.plan.groups) == (4, None)
    assert (recipe.distill.steps, recipe.distill.epochs, recipe.distill.lr) == (7, None, 0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"share": 0}, "--share 0: input should be greater than or equal to 1"),
        ({"share": -2}, "--share -2"),
        ({"share": 2, "groups": "0-1"}, "--share and --groups cannot be used together. Give only one of them"),
        (
            {"steps": 1, "epochs": 1.0},
            "--steps, --epochs and --max-minutes cannot be used together. Give only one of them",
        ),
        ({"transforms": "heads,convolution"}, "--transforms convolution: input should be 'heads', 'mlp' or 'rpe'"),
        ({"transforms": "mlp,mlp"}, "--transforms names a transformation twice"),
        ({"token_kernel": 4}, "--token-kernel 4: must be odd"),
        ({"loss": ["logit=1"]}, "--loss logit: no such loss (did you mean logits?)"),
        ({"loss": ["logits=0"]}, "--loss: every weight is zero"),
        ({"loss": ["logits"]}, "'logits' is not of the form key=value"),
        ({"max_size": "40 apples"}, "'40 apples' is not a size like 40MB"),
        ({"lr": 0.0}, "--lr 0.0: input should be greater than 0"),
        ({"mean": "a,b,c"}, "--mean a: input should be a valid number"),
        ({"label_smoothing": 0.1, "loss": {"logits": 1}}, "--label-smoothing 0.1: there is no labels loss to smooth"),
        ({"teacher_arg": ["depth=8"]}, "--teacher-arg needs --teacher"),
        ({"teacher_checkpoint": "a.pth"}, "--teacher-checkpoint needs --teacher"),
        ({"ema": 1.0}, "--ema 1.0: input should be less than 1"),
        ({"drop_path": -0.1}, "--drop-path -0.1: input should be greater than or equal to 0"),
        ({"max_relation_tokens": 1}, "--max-relation-tokens 1: input should be greater than or equal to 2"),
        ({"loss": ["hidden-relations=1"]}, "--loss hidden_relations: no such loss (did you mean hidden_relation?)"),
        ({"start": "last"}, "--start last: input should be 'first', 'mean' or 'calibrated'"),
    ],
    ids=str,
)
def test_what_cannot_be_followed(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build({"model": "deit_base", **flags})
    assert message in str(caught.value)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        from_dict({"model": {"model": "x"}, "plan": {"shar": 2}, "distil": {}, "run": {"seed": -1}})
    lines = str(caught.value).splitlines()
    assert sorted(lines) == [
        "--seed -1: input should be greater than or equal to 0.",
        "distil: no such option (did you mean distill?).",
        "plan.shar: no such option (did you mean share?).",
    ]


@pytest.mark.parametrize("text", ["[1, 2]", "plan: 3", "plan: {share: [}", "\x00"])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match="--recipe"):
        build({"model": "x"}, file=file)


def test_the_nearest_option_of_the_new_stages() -> None:
    with pytest.raises(RecipeError) as caught:
        from_dict({"model": {"model": "x"}, "teacher": {"techer": "y"}, "distill": {"relation_head": 1}})
    assert "teacher.techer: no such option (did you mean teacher?)." in str(caught.value)
    assert "distill.relation_head: no such option (did you mean relation_heads?)." in str(caught.value)


def test_a_missing_file_and_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: there is no file and no built-in recipe of this name"):
        build({}, file=tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="No model is named"):
        build({})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("40MB", 40_000_000), ("38 MiB", 38 * 2**20), ("1.5kB", 1500), ("1234", 1234), ("2GiB", 2**31), ("7000B", 7000)],
)
def test_sizes(text: str, expected: int) -> None:
    assert build({"model": "x", "max_size": text}).gates.max_size == expected


def test_pairs_are_read_as_yaml() -> None:
    recipe = build({"model": "x", "model_arg": ["img-size=32", "class_token=false", "global_pool=avg", "a=[1, 2]"]})
    assert recipe.model.model_arg == {"img_size": 32, "class_token": False, "global_pool": "avg", "a": [1, 2]}


def test_every_field_is_one_flag() -> None:
    names = [spec.name for spec in flag_specs(*STAGES)]
    assert len(set(names)) == len(names) == sum(len(dataclasses.fields(stage)) for stage in STAGES.values())
    assert all(spec.help.endswith(".") for spec in flag_specs(*STAGES))
    assert recipes.Recipe(recipes.ModelRecipe("x")) == build({"model": "x"})
