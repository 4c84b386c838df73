import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.errors import DataError
from vitcompress.evaluation import Accuracy, evaluate_pair, measure_speed, paired_interval
from vitcompress.views import Batch

from .tiny import compressed, tiny


class Fixed(nn.Module):
    """Gives image i (its one pixel) row i of a table."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x.flatten().long()]


TEACHER = torch.eye(8)[[0, 1, 2, 3]] * 5
STUDENT = torch.eye(8)[[0, 1, 2, 7]] * 5
LABELS = [0, 1, 7, 3]


def run(labels: list[int], teacher: bool = True, sizes: tuple[int, ...] = (3, 1)) -> Accuracy:
    x, y = torch.arange(4.0).reshape(4, 1, 1, 1), torch.tensor(labels)
    batches = [Batch(a, b, ()) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
    reference = Fixed(TEACHER) if teacher else None
    return evaluate_pair(Fixed(STUDENT), reference, batches, name="x", device=torch.device("cpu"))


def test_accuracies_by_hand() -> None:
    found = run(LABELS)
    assert (found.teacher_top1, found.student_top1, found.top1_drop) == (75.0, 50.0, 25.0)
    assert found.agreement == 75.0
    assert found.num_images == 4
    assert found.kl == pytest.approx(float(F.kl_div(STUDENT.log_softmax(1), TEACHER.softmax(1), reduction="sum")) / 4)
    assert found.teacher_top5 is not None
    assert found.teacher_top5 >= 75.0
    assert run(LABELS, sizes=(2, 2)) == found


def test_without_labels_there_is_agreement_and_no_accuracy() -> None:
    found = run([-1] * 4)
    assert found.agreement == 75.0
    assert (found.teacher_top1, found.student_top1, found.top1_drop, found.top1_drop_ci95) == (None,) * 4


def test_without_a_teacher_there_is_accuracy_and_no_agreement() -> None:
    found = run(LABELS, teacher=False)
    assert found.student_top1 == 50.0
    assert (found.teacher_top1, found.agreement, found.kl, found.top1_drop) == (None,) * 4


def test_interval_of_a_paired_difference() -> None:
    low, high = paired_interval(30, 10, 1000)
    assert low < 2.0 < high
    assert (high - low) / 2 == pytest.approx(1.24, abs=0.03)  # 1.96·√(b + c)/n, nearly
    assert paired_interval(10, 30, 1000) == (-high, -low)
    low, high = paired_interval(0, 0, 100)
    assert low < 0 < high


def test_nothing_readable() -> None:
    nothing = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), ("a.jpg: broken",))
    model = Fixed(STUDENT)
    with pytest.raises(DataError, match=r"a\.jpg"):
        evaluate_pair(model, None, [nothing], name="x", device=torch.device("cpu"))
    with pytest.raises(DataError, match="not one image"):
        evaluate_pair(model, None, [nothing], name="x", device=torch.device("cpu"), skip_bad_images=True)


def test_speed_of_both_at_both_batch_sizes() -> None:
    teacher = tiny()
    student, _ = compressed(teacher, share=2)
    speed = measure_speed(student, teacher, (3, 32, 32), device=torch.device("cpu"), budget_seconds=0.0)
    assert set(speed.teacher_ms) == set(speed.student_ms) == {"1", "32"}
    assert all(ms > 0 for ms in (*speed.teacher_ms.values(), *speed.student_ms.values()))
