"""Measure the teacher in fewer bits, without sharing or training, on the student's images."""

from __future__ import annotations

import copy

from torch import nn

from vitcompress.measure.accuracy import Evaluator
from vitcompress.measure.results import Accuracy, Baseline
from vitcompress.quantize.codecs import num_bytes
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.runtime.console import Reporter

BASELINES = ("fp16", "int8", "int4")


def measure_baselines(
    teacher: nn.Module, evaluator: Evaluator, accuracy: Accuracy, reporter: Reporter
) -> tuple[Baseline, ...]:
    """Evaluate the teacher in fewer bits, stored by the same functions as the student.

    Args:
        teacher: teacher in eval mode, on the accelerator's device; not changed. One copy at a time
            is in memory.
        evaluator: evaluator with the images that the student was evaluated on.
        accuracy: accuracy of student and teacher on these images.
        reporter: shows the progress.
    """
    baselines = []
    for store in BASELINES:
        reporter.say(f"evaluating the teacher in {store}")
        rounded = copy.deepcopy(teacher)
        stored = stored_tensors(rounded, store)
        round_to(rounded, stored, store)
        size = num_bytes(stored)
        del stored
        # with labels, accuracies can be compared; without, the teacher itself must run again
        reference = None if accuracy.teacher_top1 is not None else teacher
        with reporter.counting(f"teacher in {store}", brief=True) as tell:
            measured = evaluator(rounded, reference, tell)
        assert measured is not None  # there are images
        baselines.append(_baseline(f"teacher {store}", rounded, size, measured, accuracy))
    return tuple(baselines)


def _baseline(name: str, model: nn.Module, size: int, measured: Accuracy, accuracy: Accuracy) -> Baseline:
    top1, teacher_top1 = measured.student_top1, accuracy.teacher_top1
    return Baseline(
        name=name,
        params=sum(p.numel() for p in model.parameters()),
        bytes=size,
        top1=top1,
        top1_drop=None if top1 is None or teacher_top1 is None else round(teacher_top1 - top1, 4),
        agreement=measured.agreement,
        feature_cosine=measured.feature_cosine,
        r2=measured.r2,
    )
