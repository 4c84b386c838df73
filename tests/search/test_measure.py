"""Costs between measured options are interpolated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.factories import tiny
from vitcompress.families.registry import family_of
from vitcompress.recipe import KINDS
from vitcompress.search.measure import _interpolate
from vitcompress.search.options import Shapes, single_options


def test_marks_keep_what_was_measured_and_never_rise_with_width() -> None:
    teacher = tiny()
    family = family_of(teacher, "tiny")
    shapes = Shapes(teacher, family, family.block_names(teacher), KINDS, (), 3)
    for scale in ("mlp.hidden", "attn.qk", "mlp.rank"):
        options = [o for s, o in single_options(shapes, "blocks.1") if s == scale]
        falling = [replace(o, cost=2.0 / o.dial) for o in options]
        marks = _interpolate(shapes, falling)
        costs = {o.dial: o.cost for o in marks}
        for option in falling:
            assert costs[option.dial] == pytest.approx(option.cost)
            assert next(o for o in marks if o.dial == option.dial).saved_params == option.saved_params
        noisy = _interpolate(shapes, [replace(o, cost=0.1 + 0.05 * (n % 2)) for n, o in enumerate(options)])
        ordered = [o.cost for o in sorted(noisy, key=lambda o: o.dial)]
        assert ordered == sorted(ordered, reverse=True)
        assert all(o.cost > 0 for o in marks)
