"""Write a report as a Markdown page."""

from __future__ import annotations

import re
from urllib.parse import quote

from vitcompress.report.model import Report
from vitcompress.report.picture import alt_text, points_of
from vitcompress.report.remarks import plan_remarks, report_remarks
from vitcompress.report.render import render
from vitcompress.report.rows import baseline_columns, baseline_rows, report_rows
from vitcompress.report.sharing import describe_sharing


def to_markdown(report: Report, *, picture: str | None = None) -> str:
    """Return a report as a Markdown page.

    Args:
        report: report to write.
        picture: name of the file beside the page that `to_svg` was written to; None without one.
    """
    plan = plan_remarks(report.made_of, report.why)
    return render(
        "report.md.j2",
        report=report,
        sharing=describe_sharing(report.groups, report.made_of),
        rows=report_rows(report),
        remarks=[line for line in report_remarks(report) if line not in plan],
        plan=plan,
        fence=max(["```", *(f"{run}`" for run in re.findall("`+", report.command))], key=len),
        columns=baseline_columns(report),
        baselines=baseline_rows(report),
        picture=picture and quote(picture),
        alt_text=alt_text(points_of(report)),
    )
