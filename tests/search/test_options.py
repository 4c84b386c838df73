"""Options save what they claim, have widths that hardware likes, and merge into groups."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

from tests.factories import tiny
from tests.search.factories import built, num_params, shapes_of
from vitcompress.families.registry import family_of
from vitcompress.families.widths import Widths
from vitcompress.plans.make import plan_of
from vitcompress.plans.model import Group
from vitcompress.recipe import KINDS
from vitcompress.search.options import (
    MAX_RANKS,
    MAX_WIDTHS,
    PARTS,
    Option,
    Shapes,
    aligned,
    list_options,
    merge,
    run_options,
    single_options,
)
from vitcompress.surgery import apply_groups


@pytest.mark.broad
@pytest.mark.parametrize("name", ["vit", "deit3", "dinov2 swiglu", "swin", "beit", "eva02", "eva02 split"])
def test_an_option_saves_what_the_built_student_lacks(name: str) -> None:
    teacher = built(name)
    family = family_of(teacher, name)
    shapes = Shapes(teacher, family, family.block_names(teacher), KINDS, (), 3)
    options = [o for b in shapes.blocks[:2] for o in single_options(shapes, b)] + list(run_options(shapes))
    assert {o.kind for o in options} >= {"share", "low_rank"}
    assert any(o.kind == "skip" for o in options) == (name in ("vit", "deit3", "dinov2 swiglu"))
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
    shapes = shapes_of(teacher)
    family = shapes.family
    by_blocks: dict[tuple[str, ...], list[Option]] = {}
    for option in [*single_options(shapes, "blocks.0"), *run_options(shapes)]:
        by_blocks.setdefault(option.group.blocks, []).append(option)
    for blocks, options in by_blocks.items():
        parts = {part: [shapes.keep(blocks), *(o for o in options if o.part == part)] for part in PARTS}
        for a, m in itertools.product(parts["attn"][::2], parts["mlp"][::2]):
            student = copy.deepcopy(teacher)
            apply_groups(student, [merge([a, m])], family)
            assert num_params(teacher) - num_params(student) == a.saved_params + m.saved_params
    assert (shapes.keep(["blocks.0"]).nats, shapes.keep(["blocks.0"]).saved_params) == (0.0, 0)


def test_queries_values_and_neurons_merge_too() -> None:
    shapes = shapes_of(tiny(embed_dim=48), ("narrow",))
    by_scale = {o.scale: o for o in single_options(shapes, "blocks.0")}
    group = merge([shapes.keep(["blocks.0"]), *by_scale.values()])
    assert group.widths == Widths(**{scale.split(".")[1]: option.dial for scale, option in by_scale.items()})
    assert set(by_scale) == {"attn.qk", "attn.v", "mlp.hidden"}
    assert merge([shapes.keep(["blocks.0"])]) == Group(("blocks.0",), ())


@pytest.mark.parametrize(
    ("full", "multiple", "max_count", "expected"),
    [
        (64, 8, 32, [8, 16, 24, 32, 40, 48, 56]),
        (64, 16, 32, [16, 32, 48]),
        (64, 64, 32, [16, 32, 48]),  # otherwise there is nothing to choose from
        (8, 8, 32, [2, 4, 6]),
        (3, 8, 32, [1, 2]),
        (1, 8, 32, []),
        (6, 1, 32, [1, 2, 3, 4, 5]),
        (65, 8, 32, [8, 16, 24, 32, 40, 48, 56, 64]),
    ],
)
def test_widths_are_multiples(full: int, multiple: int, max_count: int, expected: list[int]) -> None:
    assert aligned(full, multiple, max_count) == expected


@pytest.mark.parametrize(("full", "multiple"), [(768, 16), (3072, 16), (4096, 16), (1000, 1), (4097, 16)])
def test_many_widths_are_thinned_out_small_ones_less(full: int, multiple: int) -> None:
    for max_count in (MAX_WIDTHS, MAX_RANKS):
        widths = aligned(full, multiple, max_count)
        assert max_count - 3 <= len(widths) <= max_count
        assert widths == sorted(set(widths))
        assert all(width % multiple == 0 for width in widths)
        assert widths[0] == multiple
        assert full - multiple <= widths[-1] < full
        gaps = [b - a for a, b in itertools.pairwise(widths)]
        assert gaps[0] < gaps[-1]


@pytest.mark.parametrize(("multiple", "heads", "neurons"), [(8, 8, 16), (16, 16, 32), (1, 1, 1)])
def test_options_have_widths_that_are_multiples(multiple: int, heads: int, neurons: int) -> None:
    teacher = tiny(embed_dim=128, num_heads=2, depth=2)  # 64 channels per head
    widths = [o.group.widths for o in list_options(shapes_of(teacher, ("narrow",), multiple=multiple))]
    for name, step in (("qk", heads), ("v", heads), ("hidden", neurons)):
        found = {width for w in widths if (width := getattr(w, name))}
        assert len(found) >= 3
        assert all(width % step == 0 for width in found)
        assert multiple > 1 or any(width % 8 for width in found)
