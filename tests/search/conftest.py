"""A model with room to choose in, and its measured options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from torch import nn

from tests.search.factories import ROOMY, lively, search_of
from vitcompress.recipe import KINDS
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.model import Search
from vitcompress.search.progress import Progress


@pytest.fixture(scope="session")
def roomy() -> nn.Module:
    return lively(**ROOMY)


@pytest.fixture(scope="session")
def measured(roomy: nn.Module) -> MeasuredOptions:
    return search_of(roomy).measure(KINDS, lambda done: None)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch, measured: MeasuredOptions) -> None:
    """Options need not be measured again."""

    def again(
        self: Search, kinds: Sequence[str], tell: Callable[[float], None], keep: Progress | None = None
    ) -> MeasuredOptions:
        shapes = replace(measured.shapes, kinds=kinds, transforms=self.transforms)
        numbers = [number for number, option in enumerate(measured.options) if option.kind in kinds]
        levels = [replace(level, nats=[level.nats[number] for number in numbers]) for level in measured.levels]
        return MeasuredOptions(shapes, [measured.options[number] for number in numbers], levels)

    monkeypatch.setattr(Search, "measure", again)
