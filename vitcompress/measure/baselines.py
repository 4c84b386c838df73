"""Was the training worth it?  The whole teacher in fewer bits, which costs no training, on the same images."""

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
    """Evaluate the teacher in fewer bits, by the functions that store the student.

    Args:
        teacher: in eval mode, on the accelerator's device; not changed. One copy of it is held at a time.
        evaluator: that the student was evaluated with; has images.
        accuracy: of the student and the teacher on these.
        reporter: told of it.
    """
    found = []
    for store in BASELINES:
        reporter.say(f"evaluating the teacher in {store}")
        rounded = copy.deepcopy(teacher)
        stored = stored_tensors(rounded, store)
        round_to(rounded, stored, store)
        size = num_bytes(stored)
        del stored
        # labels say how good it is; where there are none, the teacher as it is must run again to compare with
        reference = None if accuracy.teacher_top1 is not None else teacher
        with reporter.counting(f"teacher in {store}", brief=True) as tell:
            measured = evaluator(rounded, reference, tell)
        assert measured is not None  # there are images
        found.append(_baseline(f"teacher {store}", rounded, size, measured, accuracy))
    return tuple(found)


def _baseline(name: str, model: nn.Module, size: int, measured: Accuracy, accuracy: Accuracy) -> Baseline:
    top1, whole = measured.student_top1, accuracy.teacher_top1
    return Baseline(
        name=name,
        params=sum(p.numel() for p in model.parameters()),
        bytes=size,
        top1=top1,
        top1_drop=None if top1 is None or whole is None else round(whole - top1, 4),
        agreement=measured.agreement,
        feature_cosine=measured.feature_cosine,
    )
