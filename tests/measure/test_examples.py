"""The images on which student and teacher differ with most confidence."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image

from vitcompress.families.outputs import FEATURES, MULTI_LABEL, REGRESSION, OutputKind
from vitcompress.measure.examples import Examples


def test_the_surest_differences_are_kept() -> None:
    found = Examples((0.5,) * 3, (0.5,) * 3)
    logits = torch.eye(3)[[0] * 40] * torch.arange(40.0)[:, None]  # surer from image to image
    others = torch.eye(3)[[1] * 39 + [0]] * 60
    found.watch(torch.zeros(40, 3, 8, 8), logits, others, torch.full((40,), 2))
    kept = found.surest()
    assert (found.count, len(kept)) == (39, 12)
    assert (kept[0].student.output, kept[0].teacher, kept[0].label) == (0, (1, "100 %"), 2)
    sure = [float(each.student.value.removesuffix(" %")) for each in kept]
    assert sure == sorted(sure, reverse=True)
    with Image.open(io.BytesIO(base64.b64decode(kept[0].picture.partition(",")[2]))) as image:
        assert (image.size, image.getpixel((0, 0))) == ((8, 8), (128, 128, 128))
    found.watch(torch.zeros(40, 3, 8, 8), logits, None, torch.full((40,), 2))
    assert found.count == 39


def kept_of(kind: OutputKind, student: torch.Tensor, teacher: torch.Tensor) -> tuple[int, list[tuple[object, ...]]]:
    found = Examples((0.5,) * 3, (0.5,) * 3, kind)
    found.watch(torch.zeros(len(student), 3, 8, 8), student, teacher, torch.full((len(student),), -1))
    return found.count, [(each.teacher, each.student) for each in found.surest()]


def test_labels_differ_where_a_decision_does() -> None:
    teacher = torch.tensor([[2.0, -2.0], [2.0, -2.0], [2.0, -2.0]])
    student = torch.tensor([[9.0, -9.0], [-1.0, -2.0], [2.0, 3.0]])  # the same decisions, one other, another
    assert kept_of(MULTI_LABEL, student, teacher) == (
        2, [((1, "12 %"), (1, "95 %")), ((0, "88 %"), (0, "27 %"))]
    )  # fmt: skip


def test_numbers_differ_by_the_teachers_deviation() -> None:
    teacher = torch.tensor([[0.0, 0.0], [2.0, 200.0]])  # deviations of 1 and 100
    student = torch.tensor([[3.0, 0.0], [2.0, 240.0]])
    assert kept_of(REGRESSION, student, teacher) == (2, [((0, "0"), (0, "3")), ((1, "200"), (1, "240"))])
    assert kept_of(REGRESSION, student[:, :1], teacher[:, :1]) == (1, [((None, "0"), (None, "3"))])


def test_features_differ_by_their_cosine() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    count, rows = kept_of(FEATURES, student, teacher)
    assert (count, rows[0][1]) == (2, (None, "cosine similarity 0.0000"))
