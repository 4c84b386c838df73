import pytest

from vitcompress.distill.pairing import pair_layers
from vitcompress.errors import RecipeError

SWIN_T = ["0"] * 2 + ["1"] * 2 + ["2"] * 6 + ["3"] * 2
SWIN_S = ["0"] * 2 + ["1"] * 2 + ["2"] * 18 + ["3"] * 2


def test_equal_depths_pair_block_by_block() -> None:
    assert pair_layers(None, [""] * 5, [""] * 5) == [(i, i) for i in range(5)]
    assert pair_layers(None, SWIN_T, SWIN_T) == [(i, i) for i in range(12)]


def test_the_spread_is_that_of_the_published_scripts() -> None:
    """Mini-Swin-T learns in blocks 1, 3, 5, 7, 9, 11 from 1, 3, 9, 15, 21, 23 of a teacher's 24."""
    spread = dict(pair_layers(None, SWIN_T, SWIN_S))
    assert [spread[block] for block in (1, 3, 5, 7, 9, 11)] == [1, 3, 9, 15, 21, 23]


@pytest.mark.parametrize(("students", "teachers"), [(4, 12), (12, 4), (5, 7), (7, 5), (1, 12), (12, 1)])
def test_the_spread_climbs_and_ends_at_the_last_block(students: int, teachers: int) -> None:
    pairs = pair_layers(None, [""] * students, [""] * teachers)
    taught = [teacher for _, teacher in pairs]
    assert [student for student, _ in pairs] == list(range(students))
    assert taught == sorted(taught)
    assert (taught[0] >= 0, taught[-1]) == (True, teachers - 1)


def test_other_stages_are_spread_as_one() -> None:
    assert pair_layers(None, [""] * 2, SWIN_T) == [(0, 5), (1, 11)]


def test_explicit_layers() -> None:
    assert pair_layers("1, 3:9,0:9", [""] * 4, [""] * 12) == [(1, 1), (3, 9), (0, 9)]


def test_every_fault_of_the_layers_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        pair_layers("1:x,4:5,3:12,2,2:7", [""] * 4, [""] * 12)
    assert str(caught.value).splitlines() == [
        "--layers 1:x,4:5,3:12,2,2:7: '1:x' is not of the form STUDENT or STUDENT:TEACHER.",
        "--layers 1:x,4:5,3:12,2,2:7: 4:5 goes past the student's last block, 3.",
        "--layers 1:x,4:5,3:12,2,2:7: 3:12 goes past the teacher's last block, 11.",
        "--layers 1:x,4:5,3:12,2,2:7: student block 2 comes twice.",
    ]
