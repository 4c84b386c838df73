"""Labels are measured by decisions and ranks, numbers by their errors."""

from __future__ import annotations

import math

import pytest
import torch

from tests.measure.samples import Fixed, evaluate, numbered
from vitcompress.families.outputs import tell_outputs
from vitcompress.measure.multi_label import mean_average_precision
from vitcompress.measure.results import Accuracy


def measured(kind: str, student: torch.Tensor, teacher: torch.Tensor, sizes: tuple[int, ...] = (2, 3)) -> Accuracy:
    models = [Fixed(outputs, num_classes=outputs.shape[1]) for outputs in (student, teacher)]
    for model in models:
        tell_outputs(model, kind, name="fixed")
    return evaluate(models[0], models[1], numbered([0] * len(student), sizes))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_five_more_on_all_logits_of_labels_is_seen() -> None:
    teacher = torch.tensor([[-1.0, -4.0], [-2.0, 1.0], [-3.0, 2.0], [-6.0, -7.0], [3.0, -8.0]])
    same, moved = (measured("multi_label", outputs, teacher) for outputs in (teacher, teacher + 5))
    assert (same.agreement, same.kl, same.mean_average_precision) == (100, 0, 100)
    assert moved.agreement == 60  # 6 of 10 logits are positive already, or negative still
    assert moved.mean_average_precision == 100  # no rank changes
    assert moved.kl is not None
    assert moved.kl > 1


def test_labels_of_images_are_not_the_models_labels() -> None:
    found = measured("multi_label", noise(5, 3), noise(5, 3))
    assert (found.student_top1, found.teacher_top1, found.top1_drop, found.classes) == (None, None, None, ())
    assert found.outputs == "multi_label"


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([4, 3, 2, 1], [1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([4, 2, 2, 1], [0, 1, 0, 1], (1 / 3 + 2 / 4) / 2),  # both twos enter at once
        ([5, 5, 5, 5], [1, 0, 0, 0], 1 / 4),
    ],
)
def test_average_precision_by_hand(scores: list[int], positive: list[int], expected: float) -> None:
    columns = torch.tensor(scores)[:, None], torch.tensor(positive)[:, None] > 0
    for size in (4, 3):  # in one batch, and in two
        batches = [column.split(size) for column in columns]
        assert mean_average_precision(*batches) == pytest.approx(expected)


def test_a_label_without_images_is_left_out_of_the_mean() -> None:
    positive = torch.tensor([[True, False], [False, False]])
    assert mean_average_precision([torch.tensor([[1.0, 0.0], [0.0, 1.0]])], [positive]) == 1
    assert mean_average_precision([torch.zeros(2, 2)], [torch.zeros(2, 2, dtype=torch.bool)]) is None


def test_numbers_off_by_half_their_deviation_are_seen() -> None:
    teacher = torch.tensor([[1.0], [3.0], [1.0], [3.0], [2.0], [2.0]])
    deviation = teacher.std(correction=0).item()
    found = measured("regression", teacher + deviation / 2, teacher, (2, 4))
    assert found.r2 == pytest.approx(0.75, rel=1e-4)
    assert found.relative_rmse == pytest.approx(0.5, rel=1e-4)
    assert found.kl == pytest.approx(0.125, rel=1e-4)
    assert (found.agreement, found.student_top1) == (None, None)
    (fit,) = found.fits
    assert [fit.rmse, fit.deviation] == pytest.approx([deviation / 2, deviation], rel=1e-4)


def test_sums_of_numbers_over_parts_are_those_of_the_whole() -> None:
    teacher = 1000 + noise(40, 3)
    student = teacher + 0.1 * noise(40, 3).flip(0)
    parts, whole = (measured("regression", student, teacher, sizes) for sizes in ((1, 7, 20, 12), (40,)))
    assert parts == whole
    variance = teacher.double().var(0, correction=0)
    shares = (student.double() - teacher.double()).square().mean(0) / variance
    assert [fit.r2 for fit in whole.fits] == pytest.approx((1 - shares).tolist(), rel=1e-5)
    assert whole.r2 == pytest.approx(1 - shares.mean().item(), rel=1e-5)


def test_a_constant_output_and_a_single_image_have_finite_numbers() -> None:
    constant = measured("regression", torch.tensor([[5.0], [6.0]]), torch.tensor([[5.0], [5.0]]), (2,))
    assert constant.r2 is not None
    assert constant.r2 < -1e6
    assert measured("regression", torch.tensor([[5.0]]), torch.tensor([[4.0]]), (1,)).relative_rmse == 0.25
    assert measured("regression", torch.zeros(2, 1), torch.zeros(2, 1), (2,)).r2 == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_fit_nothing(value: float) -> None:
    found = measured("regression", torch.tensor([[1.0], [value]]), torch.tensor([[1.0], [2.0]]), (2,))
    assert (found.r2, found.relative_rmse, found.fits[0].rmse) == (-1e15, 1e15, 1e15)


def test_only_the_worst_outputs_are_listed() -> None:
    teacher = noise(9, 50)
    found = measured("regression", teacher * torch.linspace(0, 1, 50), teacher, (9,))
    assert [fit.index for fit in found.fits] == list(range(20))
