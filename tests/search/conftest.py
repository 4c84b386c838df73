"""A model with room to choose in, and its measured options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from torch import nn

from tests.factories import tiny
from tests.search.factories import ROOMY, search_of
from vitcompress.recipe import KINDS
from vitcompress.search.measure import MeasuredOptions
from vitcompress.search.model import Search


@pytest.fixture(scope="session")
def roomy() -> nn.Module:
    return tiny(**ROOMY)


@pytest.fixture(scope="session")
def measured(roomy: nn.Module) -> MeasuredOptions:
    return search_of(roomy).measure(KINDS)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch, measured: MeasuredOptions) -> None:
    """Options need not be measured again."""

    def again(self: Search, kinds: Sequence[str], later_work: float = 0.0) -> MeasuredOptions:
        shapes = replace(measured.shapes, kinds=kinds, transforms=self.transforms)
        return MeasuredOptions(shapes, measured.singles, measured.runs)

    monkeypatch.setattr(Search, "measure", again)
