"""Options in a file give the plans that measuring anew gives; other files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.factories import images, tiny
from tests.search.factories import ROOMY, num_params
from vitcompress.errors import ArtifactError, RecipeError, VitcompressError
from vitcompress.families.registry import family_of
from vitcompress.search.candidates import find_candidates
from vitcompress.search.measure import measure_options
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.options import Shapes
from vitcompress.search.saved import load_options, read_options, save_options

FACTS: dict[str, str | int | None] = {
    "model.sha256": "abc", "training images": "12 images, def", "--width-multiple": 8,
}  # fmt: skip
KINDS = ("narrow", "low_rank", "skip", "share")


@pytest.fixture(scope="module")
def measured() -> MeasuredOptions:
    model = tiny(**{**ROOMY, "depth": 4})
    family = family_of(model, "tiny")
    noise = images(model, 12)
    shapes = Shapes(model, family, family.block_names(model), KINDS, (), 3)
    return measure_options(shapes, noise[:8], noise[8:], 1e12, lambda done: None)


@pytest.fixture
def path(measured: MeasuredOptions, tmp_path: Path) -> Path:
    save_options(tmp_path / "options.json", measured, FACTS)
    return tmp_path / "options.json"


def test_a_file_gives_the_costs_and_plans_that_were_measured(measured: MeasuredOptions, path: Path) -> None:
    loaded = load_options(path, measured.shapes, FACTS)
    assert [o.group for o in loaded.options] == [o.group for o in measured.options]
    assert loaded.levels == measured.levels
    assert all(level.joint != 1 for level in loaded.levels)
    params = num_params(measured.shapes.model)
    for ratio in (1.3, 2.0, 3.0):
        found, expected = (find_candidates(options, int(params / ratio)) for options in (loaded, measured))
        assert [(c.plan, c.predicted) for c in found] == [(c.plan, c.predicted) for c in expected]
        assert found


def test_the_file_is_the_same_each_time_and_holds_every_cost(measured: MeasuredOptions, path: Path) -> None:
    text = path.read_text()
    save_options(path, measured, FACTS)
    assert path.read_text() == text
    tree = json.loads(text)
    assert (tree["format"], tree["version"], tree["facts"]) == ("vitcompress options", 1, FACTS)
    assert tree["levels"] == [{"params": level.params, "joint": level.joint} for level in measured.levels]
    costs = zip(*(level.nats for level in measured.levels), strict=True)
    assert [tuple(option["nats"]) for option in tree["options"]] == list(costs)


def test_some_of_the_kinds_can_be_used(measured: MeasuredOptions, path: Path) -> None:
    loaded = load_options(path, replace(measured.shapes, kinds=("skip", "share")), FACTS)
    assert {option.kind for option in loaded.options} == {"skip", "share"}
    for params in (0, 1e12):
        expected = [option.nats for option in measured.at(params) if option.kind in ("skip", "share")]
        assert [option.nats for option in loaded.at(params)] == expected
    with pytest.raises(RecipeError, match="--kinds: basis not measured, only narrow, low_rank, skip, share"):
        load_options(path, replace(measured.shapes, kinds=("narrow", "basis")), FACTS)


def test_what_differs_is_named(measured: MeasuredOptions, path: Path) -> None:
    facts = {**FACTS, "model.sha256": "xyz", "--width-multiple": 1}
    with pytest.raises(RecipeError) as caught:
        load_options(path, measured.shapes, facts)
    lines = str(caught.value).splitlines()[1:]
    assert lines == ["  --width-multiple: 1, was 8", "  model.sha256: xyz, was abc"]


def test_another_width_multiple_has_other_options(measured: MeasuredOptions, path: Path) -> None:
    """A file whose facts were edited does not pass, either."""
    with pytest.raises(ArtifactError, match="not those of the model"):
        load_options(path, replace(measured.shapes, multiple=3), FACTS)


def test_what_did_not_fit_in_memory_is_in_neither(measured: MeasuredOptions, tmp_path: Path) -> None:
    """Runs of blocks that are not measured together have no cost; they would seem free."""
    noise, path = images(measured.shapes.model, 12), tmp_path / "options.json"
    alone = measure_options(measured.shapes, noise[:8], noise[8:], 1.0, lambda done: None)
    assert {option.kind for option in alone.options} == {"narrow", "low_rank", "skip"}
    assert all(min(level.nats) > 0 for level in alone.levels)
    save_options(path, alone, FACTS)
    loaded = load_options(path, measured.shapes, FACTS)
    assert [o.row() for o in loaded.at(0)] == [o.row() for o in alone.at(0)]


def first(tree: dict[str, Any], **fields: Any) -> None:
    tree["options"][0] |= fields


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda tree: tree.update(format="report"),
    "another version": lambda tree: tree.update(version=2),
    "no version": lambda tree: tree.pop("version"),
    "a field too many": lambda tree: tree.update(more=1),
    "no options": lambda tree: tree.update(options=[]),
    "an option twice": lambda tree: tree["options"].append(tree["options"][0]),
    "another kind": lambda tree: first(tree, kind="magic"),
    "another block": lambda tree: first(tree, blocks=["blocks.99"]),
    "a path for a block": lambda tree: first(tree, blocks=["../../etc"]),
    "another saving": lambda tree: first(tree, saved_params=1),
    "a cost that is no number": lambda tree: first(tree, nats=[float("nan"), 1.0]),
    "a cost without end": lambda tree: first(tree, nats=[1.0, float("inf")]),
    "a cost that is too large": lambda tree: first(tree, nats=[1e300, 1.0]),
    "a cost below zero": lambda tree: first(tree, nats=[-1e-3, 1.0]),
    "a cost that is a word": lambda tree: first(tree, nats=["cheap", 1.0]),
    "costs of one level": lambda tree: first(tree, nats=[1.0]),
    "costs of three levels": lambda tree: first(tree, nats=[1.0, 1.0, 1.0]),
    "costs of no level": lambda tree: first(tree, nats=[]),
    "no cost": lambda tree: tree["options"][0].pop("nats"),
    "scores": lambda tree: first(tree, scores="AAAA"),
    "a multiple that is no number": lambda tree: tree["levels"][0].update(joint=float("nan")),
    "a multiple below zero": lambda tree: tree["levels"][1].update(joint=-1.0),
    "no multiple": lambda tree: tree["levels"][0].pop("joint"),
    "no parameters": lambda tree: tree["levels"][0].update(params=0),
    "no levels": lambda tree: tree.update(levels=[]),
    "a level missing": lambda tree: tree["levels"].pop(),
    "levels in another order": lambda tree: tree["levels"].reverse(),
    "facts in facts": lambda tree: tree["facts"].update(more={"a": 1}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_file_is_refused(
    change: Callable[[dict[str, Any]], Any], measured: MeasuredOptions, path: Path
) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(VitcompressError) as caught:
        load_options(path, measured.shapes, FACTS)
    assert str(caught.value).startswith(f"--options {path}")
    assert "--save FILE" in caught.value.hint


def test_a_cut_file_or_none_is_refused(path: Path, tmp_path: Path) -> None:
    text = path.read_bytes()
    for length in (0, 1, 100, len(text) // 2, len(text) - 3):
        path.write_bytes(text[:length])
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_options(path)
    path.write_bytes(b"\xff\xfe" + text)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_options(path)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_options(tmp_path / "none.json")
    with pytest.raises(ArtifactError, match="is not a file"):
        read_options(tmp_path)
