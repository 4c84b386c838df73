from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.measure.samples import Fixed, evaluate, numbered
from vitcompress.artifact.read import read_manifest
from vitcompress.data.loaders import Batch
from vitcompress.errors import CheckpointError, DataError
from vitcompress.measure.accuracy import Evaluator
from vitcompress.measure.results import MAX_CLASSES, MAX_CONFUSIONS, Accuracy
from vitcompress.measure.tally import LogitTally, paired_interval
from vitcompress.pipeline.evaluate import check_source
from vitcompress.pretrained.resolve import Source
from vitcompress.recipe import DataRecipe

TEACHER = torch.eye(8)[[0, 1, 2, 3]] * 5
STUDENT = torch.eye(8)[[0, 1, 2, 7]] * 5
LABELS = [0, 1, 7, 3]


def run(labels: list[int], teacher: bool = True, sizes: tuple[int, ...] = (3, 1)) -> Accuracy:
    return evaluate(Fixed(STUDENT, 8), Fixed(TEACHER, 8) if teacher else None, numbered(labels, sizes))


def test_accuracies_by_hand() -> None:
    found = run(LABELS)
    assert (found.teacher_top1, found.student_top1, found.top1_drop) == (75.0, 50.0, 25.0)
    assert found.agreement == 75.0
    assert found.num_images == 4
    assert found.kl == pytest.approx(float(F.kl_div(STUDENT.log_softmax(1), TEACHER.softmax(1), reduction="sum")) / 4)
    assert found.teacher_top5 is not None
    assert found.teacher_top5 >= 75.0
    assert run(LABELS, sizes=(2, 2)) == found


def test_the_share_that_is_done_is_told_where_it_is_known() -> None:
    batches = [Batch(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]), ())] * 4
    told: list[float] = []
    for given in (batches, (batch for batch in batches)):  # nobody knows how many the second are
        evaluate(Fixed(STUDENT, 8), None, given, tell=told.append)
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_classes_and_confusions_by_hand() -> None:
    found = run([0, 1, 3, 3])  # the teacher says 0 1 2 3, the student 0 1 2 7
    hits = [(row.index, row.num_images, row.teacher_hits, row.student_hits) for row in found.classes]
    assert hits == [(3, 2, 1, 0), (0, 1, 1, 1), (1, 1, 1, 1)]
    (added,) = found.confusions  # 3 for 2 is the teacher's own
    assert (added.label, added.predicted, added.teacher_images, added.student_images) == (3, 7, 0, 1)
    alone = run([0, 1, 3, 3], teacher=False)
    assert [row.index for row in alone.classes] == [3, 0, 1]
    assert [(row.predicted, row.teacher_images) for row in alone.confusions] == [(2, None), (7, None)]
    assert (run([-1] * 4).classes, run([-1] * 4).confusions) == ((), ())


def test_of_many_classes_the_report_tells_of_those_that_changed_most() -> None:
    teacher, student = LogitTally(), LogitTally()  # of two processes
    for tally, classes in ((teacher, range(40)), (student, range(40, 80))):
        for label in classes:
            said = torch.eye(81)[[label] * 10]
            wrong = torch.eye(81)[[80] * label + [label] * 10][:10] if label < 10 else said
            tally.add(wrong, said, torch.full((10,), label))
    found = (teacher + student).result("x")
    assert len(found.classes) == MAX_CLASSES
    assert [row.index for row in found.classes][:10] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [(row.label, row.student_images) for row in found.confusions] == [(n, n) for n in range(9, 0, -1)]
    assert len(found.confusions) <= MAX_CONFUSIONS


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


@pytest.mark.parametrize(("asked", "processes", "parts", "at_once"), [(64, 1, 1, 64), (1024, 2, 4, 128), (8, 4, 4, 1)])
def test_a_process_evaluates_no_more_images_at_once_than_it_trains_on(
    asked: int, processes: int, parts: int, at_once: int
) -> None:
    accelerator: Any = SimpleNamespace(num_processes=processes)
    assert Evaluator(None, {}, DataRecipe(batch_size=asked), accelerator, parts).batch_size == at_once


def test_nothing_readable() -> None:
    nothing = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), ("a.jpg: broken",))
    model = Fixed(STUDENT, 8)
    with pytest.raises(DataError, match=r"a\.jpg"):
        evaluate(model, None, [nothing])
    with pytest.raises(DataError, match="x: none of the images could be read"):
        evaluate(model, None, [nothing], skip_bad_images=True)


@pytest.mark.thorough
def test_a_source_of_another_kind_or_far_too_large_is_refused_before_it_is_built(mini: Path) -> None:
    manifest = read_manifest(mini)
    own = Source(**manifest.source)
    check_source(own, manifest, file_bytes=mini.stat().st_size)
    for other, message in (
        (replace(own, architecture="deit_tiny_patch16_224"), "its source is a deit_tiny_patch16_224"),
        (replace(own, model_args={"embed_dim": 8192, "depth": 12, "num_heads": 1}), "too many for a file of"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_source(other, manifest, file_bytes=mini.stat().st_size)
