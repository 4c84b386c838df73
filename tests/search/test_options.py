"""Options save what they claim, and merge into groups."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

from tests.factories import tiny
from tests.search.factories import built, num_params
from vitcompress.families.registry import family_of
from vitcompress.plans.make import plan_of
from vitcompress.plans.model import Group
from vitcompress.recipe import KINDS
from vitcompress.search.options import PARTS, Option, Shapes, merge, run_options, single_options
from vitcompress.surgery import apply_groups


@pytest.mark.broad
@pytest.mark.parametrize("name", ["vit", "deit3", "dinov2 swiglu", "swin", "beit", "eva02", "eva02 split"])
def test_an_option_saves_what_the_built_student_lacks(name: str) -> None:
    teacher = built(name)
    family = family_of(teacher, name)
    shapes = Shapes(teacher, family, family.block_names(teacher), KINDS, (), 3)
    options = [o for b in shapes.blocks[:2] for _, o in single_options(shapes, b)] + list(run_options(shapes))
    assert {o.kind for o in options} >= {"share", "low_rank"}
    if family.narrow_attention is None:
        assert not [o for o in options if o.group.widths.qk or o.group.widths.v]
    seen: set[Any] = set()
    for option in options:
        key = (option.kind, option.part, len(option.group.blocks), option.group.blocks[0][:9], option.dial > 4)
        if key in seen:
            continue
        seen.add(key)
        student = copy.deepcopy(teacher)
        apply_groups(student, [option.group], family)
        assert num_params(teacher) - num_params(student) == option.saved_params, option
        assert option.saved_params > 0 or option.kind in ("adapter", "basis"), option
        rest = [Group((b,), ()) for b in shapes.blocks if b not in option.group.blocks]
        whole = plan_of(teacher, family, [option.group, *rest], (), 3)
        assert whole.size.student_params == num_params(student)


def test_an_attention_and_an_mlp_of_any_kinds_merge_into_one_group() -> None:
    teacher = tiny()
    family = family_of(teacher, "tiny")
    shapes = Shapes(teacher, family, family.block_names(teacher), KINDS, (), 3)
    by_blocks: dict[tuple[str, ...], list[Option]] = {}
    for option in [o for _, o in single_options(shapes, "blocks.0")] + list(run_options(shapes)):
        by_blocks.setdefault(option.group.blocks, []).append(option)
    for blocks, options in by_blocks.items():
        parts = {part: [shapes.keep(blocks), *(o for o in options if o.part == part)] for part in PARTS}
        for a, m in itertools.product(parts["attn"][::2], parts["mlp"][::2]):
            student = copy.deepcopy(teacher)
            apply_groups(student, [merge(a, m)], family)
            assert num_params(teacher) - num_params(student) == a.saved_params + m.saved_params
    assert (shapes.keep(["blocks.0"]).cost, shapes.keep(["blocks.0"]).saved_params) == (0.0, 0)
