"""Recipes that come with the package run, name their sources and follow the publications."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from tests.conftest import Vitcompress, model_flags
from tests.recipe.test_presets import PUBLISHED, WIDTHS
from vitcompress.cli.app import app
from vitcompress.errors import RecipeError
from vitcompress.pipeline import plan as pipeline
from vitcompress.recipe import Recipe, shipped
from vitcompress.recipe.compose import build, from_dict

PAPER = (
    "mini-deit-ti", "mini-deit-s", "mini-deit-b", "mini-deit-b-single", "mini-deit-b-384", "mini-swin-t",
    "mini-swin-s", "mini-swin-b", "mini-swin-b-384",
)  # fmt: skip
TRANSFER = tuple(f"transfer-{name}" for name in ("cifar10", "cifar100", "flowers", "cars", "pets"))
NOTES = ["what", "published", "measured", "unknown", "differs", "run"]


def recipe_of(name: str) -> Recipe:
    return build({}, file=Path(name), family_name=pipeline.family_name)


def notes_of(name: str) -> dict[str, Any]:
    notes: dict[str, Any] = yaml.safe_load(shipped.recipe_text(name))["notes"]
    return notes


def test_every_model_of_the_paper_is_there_and_has_a_short_variant() -> None:
    assert set(shipped.recipe_names()) == {f"{name}{end}" for name in (*PAPER, *TRANSFER) for end in ("", "-posthoc")}
    for name in (*PAPER, *TRANSFER):
        full, short = (yaml.safe_load(shipped.recipe_text(f"{name}{end}")) for end in ("", "-posthoc"))
        assert short["distill"]["epochs"] * 5 < full["distill"]["epochs"]
        assert short["plan"] == full["plan"] if "plan" in full else "plan" not in short
        assert short.get("preset") == full.get("preset")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",  # the test above checks that a -posthoc recipe has the same plan
    [pytest.param(n, marks=[pytest.mark.slow] * n.endswith("-posthoc")) for n in shipped.recipe_names()],
)
def test_every_recipe_passes_a_dry_run_without_weights_or_images(
    name: str, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a dry run reads no weights")

    monkeypatch.setattr("vitcompress.pretrained.load.load_pretrained", fail)
    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    monkeypatch.chdir(tmp_path)
    ended = vitcompress("compress", "--recipe", name, "--dry-run")
    assert ended.code == 0
    assert "parameters" in ended.err
    assert from_dict(yaml.safe_load(ended.out)) == recipe_of(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", shipped.recipe_names())
def test_every_recipe_says_what_it_rests_on(name: str) -> None:
    notes = notes_of(name)
    assert list(notes) == NOTES
    assert all(notes[key] for key in NOTES)
    assert notes["measured"].startswith("Nothing yet")
    if name.endswith("-posthoc"):
        assert notes["published"][0].startswith("Nothing of this variant")


def test_no_accuracy_is_stated_where_none_can_be_sourced() -> None:
    for name in shipped.recipe_names():
        if "single" in name or name.startswith("transfer-"):
            assert "%" not in str(notes_of(name))
        else:
            assert "% top-1" in str(notes_of(name)["published"])


@pytest.mark.parametrize("name", shipped.recipe_names())
def test_the_command_of_a_recipe_names_it_and_can_be_typed(name: str) -> None:
    words = shlex.split(notes_of(name)["run"])
    assert words[0] == "vitcompress"
    assert words[words.index("--recipe") + 1] == name
    group = typer.main.get_command(app)
    with group.make_context("vitcompress", words[1:2], resilient_parsing=True) as root:
        command = group.get_command(root, words[1])  # type: ignore[attr-defined]
        if command is not None:
            command.make_context(words[1], words[2:], parent=root)


@pytest.mark.broad
@pytest.mark.parametrize("name", ["mini-deit-ti", "mini-deit-s", "mini-deit-b", "mini-deit-b-single"])
@pytest.mark.parametrize("end", ["", "-posthoc"])
def test_mini_deit_has_the_published_parameters(name: str, end: str) -> None:
    recipe = recipe_of(f"{name}{end}")
    model, share = recipe.model.model, recipe.plan.share
    size = pipeline.plan(recipe.model, recipe.plan).size
    assert share is not None
    assert size.student_params == PUBLISHED[model][share] + 2 * WIDTHS[model]
    assert f"{size.student_params:,}" in notes_of(f"{name}{end}")["measured"]


def test_full_recipes_keep_to_the_published_schedules() -> None:
    """Learning rates are published per 512 images, warm-up in epochs."""
    for name in PAPER:
        recipe = recipe_of(name)
        step, swin, large = recipe.data.step_images, "swin" in name, "384" in name
        assert step == (256 if large else 1024)
        assert recipe.distill.epochs == (30 if large else 300)
        base = (2e-5 if swin else 5e-6) if large else 5e-4
        assert recipe.distill.lr == pytest.approx(base * step / 512)
        assert recipe.distill.epochs is not None
        assert recipe.distill.warmup * recipe.distill.epochs == pytest.approx(20 if swin and not large else 5, rel=1e-3)
        assert recipe.distill.weight_decay == (1e-8 if large else 0.05)
        assert recipe.data.repeats == (1 if swin else 3)
        assert (recipe.data.mixup, recipe.data.cutmix, recipe.data.erase) == (0.8, 1.0, 0.25)
        losses = {"logits": 1.0, "attention": 1.0, "hidden_relation": 0.1} if swin else {"logits": 1.0}
        assert recipe.distill.loss == ({"labels": 1.0} if large else losses)


def test_recipes_lists_them_and_shows_one(vitcompress: Vitcompress) -> None:
    ended = vitcompress("recipes")
    assert (ended.code, ended.err) == (0, "")
    assert [line.split()[0] for line in ended.out.splitlines()] == shipped.recipe_names()
    shown = vitcompress("recipes", "show", "mini-swin-t")
    assert (shown.code, shown.out) == (0, (shipped.HERE / "mini-swin-t.yaml").read_text(encoding="utf-8"))


def test_a_shown_recipe_is_a_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(shipped.recipe_text("mini-deit-ti"), encoding="utf-8")
    assert build({}, file=file, family_name=pipeline.family_name) == recipe_of("mini-deit-ti")


def test_flags_win_over_a_shipped_recipe() -> None:
    recipe = build(
        {"steps": 7, "transforms": "heads"}, file=Path("mini-deit-s-posthoc"), family_name=pipeline.family_name
    )
    assert (recipe.distill.steps, recipe.distill.epochs, recipe.plan.transforms) == (7, None, ("heads",))
    assert recipe.plan.share_biases


# --- mistakes


def test_an_unknown_recipe_names_the_nearest(vitcompress: Vitcompress) -> None:
    for words in (["recipes", "show", "mini-deit-bb"], ["compress", "--recipe", "mini-deit-bb", "--dry-run"]):
        ended = vitcompress(*words)
        assert (ended.code, ended.out) == (2, "")
        assert "(did you mean mini-deit-b?)" in ended.err
        assert "vitcompress recipes" in ended.err
    with pytest.raises(RecipeError, match="no recipe of that name"):
        shipped.recipe_text("../presets")


def test_an_unknown_recipe_hides_no_other_fault(vitcompress: Vitcompress) -> None:
    ended = vitcompress("compress", "--recipe", "mini-swint", "--preset", "minvit", "--share", 0, "--dry-run")
    assert (ended.code, ended.out) == (2, "")
    for line in (
        "--recipe mini-swint: there is no file and no built-in recipe of this name",
        "did you mean mini-swin-t?",
        "--preset minvit",
        "--share 0",
    ):
        assert line in ended.err
    assert "No model" not in ended.err


def test_a_dry_run_tells_every_fault_at_once(vitcompress: Vitcompress, no_network: None) -> None:
    words = ["vit_tiny_patch16_224", *model_flags(), "--share", 9, "--auto-augment", "magic", "--teacher", "deit_bsae"]
    ended = vitcompress("compress", *words, "--dry-run")
    assert (ended.code, ended.out) == (2, "")
    for line in ("--share 9: the model has 4 blocks", "--auto-augment magic", "--teacher deit_bsae is unknown"):
        assert line in ended.err


def test_only_a_dry_run_needs_no_out(vitcompress: Vitcompress) -> None:
    ended = vitcompress("compress", "vit_tiny_patch16_224", *model_flags())
    assert (ended.code, ended.out) == (2, "")
    assert "--out is missing" in ended.err
