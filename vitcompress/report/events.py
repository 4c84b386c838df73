"""What is a program told of a run?  The plan and the result, as events of `vitcompress.runtime.console.EVENTS`."""

from __future__ import annotations

from pathlib import Path

from vitcompress.plans.model import Plan
from vitcompress.report.model import Report, to_json
from vitcompress.runtime.console import Reporter


def tell_plan(reporter: Reporter, name: str, plan: Plan) -> None:
    """Log what will be shared.

    Args:
        reporter: whose log it goes to.
        name: of the teacher.
        plan: of the student.
    """
    reporter.tell("plan", model=name, groups=[len(group.blocks) for group in plan.groups], size=to_json(plan.size))


def tell_result(reporter: Reporter, report: Report, out: Path) -> None:
    """Log what was measured, and what was written.

    Args:
        reporter: whose log it goes to; of several processes, the main one has one.
        report: of the result.
        out: the file.
    """
    if reporter.log is None:
        return
    reporter.tell("evaluate", accuracy=to_json(report.accuracy) if report.accuracy else None)
    reporter.tell("wrote", file=str(out), bytes=out.stat().st_size)
