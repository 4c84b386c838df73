"""What came out?  `Report` holds every number that a user is shown; the renderings only lay it out."""

from vitcompress.measure.examples import Example, Examples
from vitcompress.report.diff import (
    Difference,
    compared_html,
    compared_rows,
    differences,
    print_compared,
    print_differences,
)
from vitcompress.report.gates import missed_gates, unreachable_gates
from vitcompress.report.model import SCHEMA_VERSION, Baseline, Parent, Report, to_json
from vitcompress.report.page import Result, to_html
from vitcompress.report.reading import from_json
from vitcompress.report.terminal import (
    print_accuracy,
    print_options,
    print_plan,
    print_report,
    to_markdown,
    to_svg,
)

__all__ = [
    "SCHEMA_VERSION",
    "Baseline",
    "Difference",
    "Example",
    "Examples",
    "Parent",
    "Report",
    "Result",
    "compared_html",
    "compared_rows",
    "differences",
    "from_json",
    "missed_gates",
    "print_accuracy",
    "print_compared",
    "print_differences",
    "print_options",
    "print_plan",
    "print_report",
    "to_html",
    "to_json",
    "to_markdown",
    "to_svg",
    "unreachable_gates",
]
