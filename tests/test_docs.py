"""Every command that the documentation shows can be typed."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer.main
from safetensors.torch import save_file

import vitcompress
from tests.report.samples import REPORT
from vitcompress.cli.app import app
from vitcompress.errors import RecipeError
from vitcompress.pipeline import compress as pipeline
from vitcompress.recipe import Recipe
from vitcompress.recipe.compose import build
from vitcompress.report.model import Report

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = re.compile(r"\s(?:\||\|\||&&|;|>|2>)\s.*$|\s\"\$@\".*$")  # what follows a command in a script
COMMANDS = sorted(
    {
        SHELL.sub("", command)
        for page in PAGES
        for command in re.findall(r"^\s*(?:\$ )?(vitcompress [a-z].*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_parses(command: str) -> None:
    group = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    with group.make_context("vitcompress", words[:1], resilient_parsing=True) as root:
        sub = group.get_command(root, words[0])  # type: ignore[attr-defined]
        assert sub is not None, words[0]
        sub.make_context(words[0], words[1:], parent=root)


def test_the_reference_has_every_command_and_the_pages_no_other() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert {name for name in known if f"`vitcompress {name}" not in reference} == set()
    for page in PAGES:
        named = set(re.findall(r"`vitcompress ([a-z]+)", page.read_text(encoding="utf-8")))
        assert named <= known, page.name


@pytest.mark.thorough
def test_the_pyramid_of_the_detection_page_is_that_of_the_students_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's Python runs on a compressed Swin and gives the outputs of its stages."""
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 4, 2], "num_heads": [2, 4, 8]}
    args |= {"window_size": 4, "num_classes": 5}
    save_file(timm.create_model("swin_tiny_patch4_window7_224", **args).state_dict(), tmp_path / "weights.safetensors")
    recipe = build({
        "model": "swin_tiny_patch4_window7_224", "model_arg": args, "checkpoint": tmp_path / "weights.safetensors",
        "share": 2, "steps": 0, "device": "cpu", "calibration_images": 8,
    })  # fmt: skip
    vitcompress.compress(recipe, tmp_path / "mini.safetensors")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / "detection.md").read_text(encoding="utf-8"), re.DOTALL
    )
    found: dict[str, Any] = {}
    exec(code, found)
    assert [tuple(features.shape) for features in found["pyramid"]] == [(2, 16, 16, 16), (2, 32, 8, 8), (2, 64, 4, 4)]
    assert (found["channels"], found["strides"]) == ([16, 32, 64], [2, 4, 8])
    backbone = vitcompress.load(tmp_path / "mini.safetensors")
    outputs: list[Any] = []
    for stage in backbone.layers:  # type: ignore[union-attr]
        stage.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    backbone(found["images"])  # with gradients, as on the page: without them attention is computed in other blocks
    for features, output in zip(found["pyramid"], outputs, strict=True):
        torch.testing.assert_close(features, output.permute(0, 3, 1, 2))  # with gradients, and without: other kernels


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_make_target_of_the_pages_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|    )make ([a-z][a-z-]*)", "\n".join(p.read_text(encoding="utf-8") for p in PAGES)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_example_of_the_reference_is_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it runs but the training, which others test."""
    asked: list[tuple[Recipe, str]] = []

    def compress(recipe: Recipe, out: str) -> Report:
        asked.append((recipe, out))
        return REPORT

    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", reference, re.DOTALL)
    monkeypatch.setattr("vitcompress.pipeline.compress.compress", compress)
    exec(code, {})
    ((recipe, out),) = asked
    found, _ = pipeline.dry_run(recipe)
    assert found is not None
    assert (len(found.groups), recipe.distill.steps, out) == (1, 200, "mini.safetensors")


@pytest.mark.parametrize("function", ["compress", "plan", "finetune"])
def test_a_name_in_the_place_of_a_recipe_is_a_mistake_with_an_example(function: str, mini: Path) -> None:
    given = {"compress": ("fashion_vit", "x.safetensors"), "plan": ("fashion_vit", None)}
    with pytest.raises(RecipeError, match=r"'fashion_vit': expected (Model)?Recipe, got str") as caught:
        getattr(vitcompress, function)(*given.get(function, (mini, "fashion_vit", "x.safetensors")))
    assert "For example" in caught.value.hint
