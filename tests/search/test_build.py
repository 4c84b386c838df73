"""The most promising candidates are built and made more even."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from tests.search.factories import search_of
from vitcompress.recipe import TargetRecipe
from vitcompress.search.candidates import Candidate
from vitcompress.search.target import reach


@pytest.mark.broad
@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("helps", [1, 3])
def test_plans_are_made_even_for_as_long_as_that_helps(
    helps: int, roomy: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Candidate] = []

    def build(candidate: Candidate, *rest: Any) -> Candidate:
        made = candidate.name.endswith("evened")
        tried.extend([candidate] if made else [])
        return replace(candidate, cost=1.0 - 0.1 * min(len(tried), helps) if made else 1.0)

    monkeypatch.setattr("vitcompress.search.build.build_candidate", build)
    chosen = reach(TargetRecipe(target_ratio=2.5, kinds=("narrow",)), search_of(roomy))
    assert len(tried) == helps + 1
    assert chosen.plan.groups == tried[helps - 1].plan.groups
    assert [candidate.name for candidate in chosen.tried] == ["narrow, evened", "narrow"]
    assert "predicted" not in chosen.reasons()[0]
