"""Write the plan and the result to the log of JSON events."""

from __future__ import annotations

from pathlib import Path

from vitcompress.plans.model import Plan
from vitcompress.report.model import Report, to_json
from vitcompress.runtime.console import Reporter


def tell_plan(reporter: Reporter, name: str, plan: Plan) -> None:
    """Log a plan.

    Args:
        reporter: owner of the log.
        name: name of the model.
        plan: plan of the student.
    """
    reporter.tell("plan", model=name, groups=[len(group.blocks) for group in plan.groups], size=to_json(plan.size))


def tell_result(reporter: Reporter, report: Report, out: Path) -> None:
    """Log what was measured and which file was written.

    Args:
        reporter: owner of the log; only the main process has one.
        report: report of the result.
        out: path of the artifact.
    """
    if reporter.log is None:
        return
    reporter.tell("evaluate", accuracy=to_json(report.accuracy) if report.accuracy else None)
    reporter.tell("wrote", file=str(out), bytes=out.stat().st_size)
