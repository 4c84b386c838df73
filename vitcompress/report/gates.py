"""Is the result good enough for CI?  One line per missed gate."""

from __future__ import annotations

import math

from vitcompress.recipe import GateRecipe
from vitcompress.report.model import Report


def missed_gates(report: Report, gates: GateRecipe, *, file_bytes: int) -> list[str]:
    """The gates that a result misses; one that cannot be measured, or is of no number, is missed.

    Args:
        report: of the result.
        gates: what it must reach.
        file_bytes: size of the file on disk.

    Returns:
        One line each.
    """
    missed = []
    if gates.max_drop is not None:
        drop = report.accuracy.top1_drop if report.accuracy else None
        if drop is None:
            missed.append(f"--max-drop {gates.max_drop:g}: not measured (no labelled images, or no teacher).")
        elif not drop <= gates.max_drop:
            missed.append(f"--max-drop {gates.max_drop:g}: top-1 drops by {drop:.2f} points.")
    if gates.min_ratio is not None and not gates.min_ratio <= report.size.params_ratio < math.inf:
        missed.append(f"--min-ratio {gates.min_ratio:g}: {report.size.params_ratio:.2f} times fewer parameters.")
    if gates.max_size is not None and not file_bytes <= gates.max_size:
        missed.append(f"--max-size {gates.max_size:,} bytes: the file has {file_bytes:,}.")
    return missed
