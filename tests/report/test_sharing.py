"""The map of blocks."""

from __future__ import annotations

from dataclasses import replace

from tests.report.samples import REPORT
from vitcompress.plans.model import Group
from vitcompress.report.sharing import boxes


def test_the_map_has_every_block_in_its_order_and_a_row_for_each_stage() -> None:
    turns = (
        Group(("blocks.0", "blocks.2"), ("a",)),
        Group(("blocks.1", "blocks.10"), ("a",)),
        Group(("blocks.3",), ()),
    )
    (row,) = boxes(replace(REPORT, made_of=turns))
    assert [(box.block, box.group, box.is_donor) for box in row] == [
        (0, "A", True), (1, "B", True), (2, "A", False), (3, "", False), (10, "B", False)
    ]  # fmt: skip
    stages = tuple(Group((f"layers.{n}.blocks.0", f"layers.{n}.blocks.1"), ("a",)) for n in range(4))
    assert [len(row) for row in boxes(replace(REPORT, made_of=stages))] == [2, 2, 2, 2]
    many = tuple(Group((f"blocks.{2 * n}", f"blocks.{2 * n + 1}"), ("a",)) for n in range(30))
    assert [box.group for box in boxes(replace(REPORT, made_of=many))[0]][50:54] == ["Z", "Z", "AA", "AA"]
    assert [box.group for box in boxes(REPORT)[0]] == [*"AAAAABBBBBCC"]  # of a report from before groups were told
