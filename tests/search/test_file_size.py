"""A size is kept to and made use of."""

from __future__ import annotations

import pytest
from torch import nn

from tests.search.factories import search_of
from vitcompress.errors import PlanError
from vitcompress.recipe import TargetRecipe
from vitcompress.search.model import Search
from vitcompress.search.target import reach


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("store", [None, "source", "int8"])
def test_a_size_is_kept_and_made_use_of(store: str | None, roomy: nn.Module) -> None:
    limit = 150_000
    chosen = reach(TargetRecipe(target_size=limit, kinds=("narrow", "low_rank")), search_of(roomy, store=store))
    assert 0.9 * limit <= chosen.plan.size.student_bytes + 1000 <= limit
    assert chosen.store == store or store is None


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("store", "limit"), [(None, 8_000), ("source", 42_000)])
def test_a_size_out_of_reach_names_one_that_is_not(store: str | None, limit: int, roomy: nn.Module) -> None:
    with pytest.raises(PlanError, match=f"--target-size {limit:,} bytes is out of reach") as error:
        reach(TargetRecipe(target_size=limit, kinds=("share",)), search_of(roomy, store=store))
    least = error.value.hint.split("--target-size ")[1].split(",")[0]
    again = TargetRecipe(target_size=least, kinds=("share",))  # type: ignore[arg-type]
    chosen = reach(again, search_of(roomy, store=store))
    assert chosen.plan.size.student_bytes + 1000 <= int(least.removesuffix("kB")) * 1000


@pytest.mark.parametrize(("store", "rest"), [(None, 7_350), ("source", 41_876)])
def test_a_size_that_the_rest_exceeds_is_refused_before_measuring(
    store: str | None, rest: int, roomy: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(PlanError, match=f"{rest:,} bytes lie outside its blocks") as error:
        reach(TargetRecipe(target_size=2000), search_of(roomy, store=store))
    assert f"{-(-rest // 1000)}kB" in error.value.hint
