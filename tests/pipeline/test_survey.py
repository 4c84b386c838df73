"""`vitcompress models` counts what `plan` counts, and builds only the models that match."""

import json

import pytest
import timm

from tests.conftest import Vitcompress
from vitcompress.errors import ModelError
from vitcompress.pipeline import survey as module
from vitcompress.pipeline.plan import plan
from vitcompress.pipeline.survey import survey
from vitcompress.pretrained.short_names import SHORT_NAMES
from vitcompress.recipe import ModelRecipe, PlanRecipe


def test_a_pattern_selects_names_and_the_numbers_are_the_plans(vitcompress: Vitcompress) -> None:
    ended = vitcompress("models", "deit_tiny", "--json", "--quiet")
    found = json.loads(ended.out)
    assert (ended.code, ended.err, found["share"], found["unfit"]) == (0, "", 2, [])
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {"deit_tiny", "deit_tiny_distilled"}
    size = plan(ModelRecipe("deit_tiny"), PlanRecipe(share=2)).size
    assert rows["deit_tiny"]["timm_name"] == "deit_tiny_patch16_224"
    assert rows["deit_tiny"]["teacher_params"] == size.teacher_params == 5_717_416
    assert rows["deit_tiny"]["student_params"] == size.student_params
    assert rows["deit_tiny"]["params_ratio"] == size.params_ratio


def test_the_table(vitcompress: Vitcompress) -> None:
    ended = vitcompress("models", "swin_tiny_patch4_window7_224")
    assert ended.code == 0
    for text in (
        "\nswin_tiny  swin ",
        "28,288,354",
        "more timm models are not shown. To search them, run: vitcompress models PATTERN",
    ):
        assert text in ended.out


def test_without_a_pattern_it_is_the_short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def row(name: str, timm_name: str) -> module.Row:
        counted.append(name)
        return module.Row(name, timm_name, "vit", 2, 1, 2.0)

    monkeypatch.setattr(module, "_row", row)
    told: list[float] = []
    found = survey(tell=told.append)
    assert counted == ["fashion_vit", *SHORT_NAMES]
    assert told[-1] == 1.0
    assert found.num_more > 100
    everything = survey("*")
    assert everything.num_more == 0
    assert len(everything.rows) >= found.num_more + len(SHORT_NAMES)


def test_a_tag_counts_where_there_is_a_dot() -> None:
    names = [row.name for row in survey("vit_tiny_patch16_224.augreg*").rows]
    assert names == sorted(timm.list_pretrained("vit_tiny_patch16_224.augreg*"))
    assert len(names) > 1


def test_what_cannot_be_compressed_is_named() -> None:
    found = survey("vit_pwee*")
    assert (found.rows, found.unfit) == ((), ("vit_pwee_patch16_reg1_gap_256",))


def test_no_such_name(vitcompress: Vitcompress) -> None:
    ended = vitcompress("models", "resnet18", "--quiet")
    assert (ended.code, ended.out) == (2, "")
    assert "No model name matches 'resnet18'" in ended.err
    with pytest.raises(ModelError, match="did you mean deit_tiny"):
        survey("diet_tiny")
