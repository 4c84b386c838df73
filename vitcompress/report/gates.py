"""Check quality gates: one line for each gate that is missed."""

from __future__ import annotations

import math

from vitcompress.plans.model import Size
from vitcompress.recipe import GateRecipe
from vitcompress.report.model import Report
from vitcompress.report.remarks import chance_remark


def unreachable_gates(size: Size, gates: GateRecipe) -> list[tuple[str, str]]:
    """Return the gates that a plan misses however it is trained, as `(message, hint)` pairs.

    Args:
        size: size of the plan.
        gates: gates that the result must meet.
    """
    faults = []
    if gates.min_ratio is not None and size.params_ratio < gates.min_ratio:
        message = f"--min-ratio {gates.min_ratio:g}: this plan only reaches {size.params_ratio:.2f}."
        faults.append((message, f"Increase --share, or use --target-ratio {gates.min_ratio:g}."))
    if gates.max_size is not None and size.student_bytes > gates.max_size:
        message = f"--max-size {gates.max_size:,} bytes: this plan's tensors alone have {size.student_bytes:,}."
        faults.append((message, "Give --store int8 or int4, or --target-size."))
    return faults


def missed_gates(report: Report, gates: GateRecipe, *, file_bytes: int) -> list[str]:
    """Return one line for each gate that a result misses.

    A value that is NaN or was not measured misses its gate.

    Args:
        report: report of the result.
        gates: gates that the result must meet.
        file_bytes: size of the file on disk.
    """
    missed = []
    if gates.max_drop is not None:
        drop = report.accuracy.top1_drop if report.accuracy else None
        if drop is None and report.outputs not in (None, "classes"):
            missed.append(f"--max-drop {gates.max_drop:g}: not measured (there is no top-1 of {report.outputs}).")
        elif drop is None:
            missed.append(f"--max-drop {gates.max_drop:g}: not measured (no labeled images, or no teacher).")
        elif not drop <= gates.max_drop:
            missed.append(f"--max-drop {gates.max_drop:g}: top-1 drops by {drop:.2f} points.")
    if gates != GateRecipe() and report.accuracy and report.accuracy.is_at_chance:
        missed.append(f"no gate is met: {chance_remark(report.accuracy, 'the teacher')}")
    if gates.min_ratio is not None and not gates.min_ratio <= report.size.params_ratio < math.inf:
        ratio = f"{report.size.params_ratio:.2f}"
        missed.append(f"--min-ratio {gates.min_ratio:g}: the student has only {ratio} times fewer parameters.")
    if gates.max_size is not None and not file_bytes <= gates.max_size:
        missed.append(f"--max-size {gates.max_size:,} bytes: the file has {file_bytes:,} bytes.")
    return missed
