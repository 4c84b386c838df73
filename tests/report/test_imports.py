"""Reading, printing and comparing reports imports none of the slow packages."""

import subprocess
import sys

import pytest

SLOW = {"torch", "timm", "torchvision", "accelerate", "matplotlib", "jinja2", "numpy", "PIL"}
LIGHT_MODULES = [
    *(f"report.{name}" for name in (
        "compare", "diff", "gates", "markdown", "model", "picture", "private", "remarks", "rows", "sharing",
        "terminal",
    )), "measure.results", "distill.log", "plans.model",
]  # fmt: skip
USE = """
import io
from rich.console import Console
from vitcompress.distill.log import TrainLog
from vitcompress.plans.model import Size
from vitcompress.recipe import GateRecipe
from vitcompress.report import compare, diff, gates, terminal
from vitcompress.report.model import Report, Result, from_json, to_json

console = Console(file=io.StringIO())
size = Size(2, 1, 2.0, 8, 4, 2.0)
report = Report(1, "vit", "vit", (2,), (), size, None, None, TrainLog(), None, {}, "")
assert from_json(to_json(report)) == report
result = Result("a", 1, report, {})
terminal.print_report(report, console)
compare.print_compared([result, result], ["a", "b"], console)
diff.print_differences(diff.differences(result, result), ("a", "b"), console)
gates.missed_gates(report, GateRecipe(max_drop=1.0), file_bytes=1)
"""


@pytest.mark.parametrize(
    "code", ["\n".join(f"import vitcompress.{name}" for name in LIGHT_MODULES), USE], ids=["all", "use"]
)
def test_nothing_slow_is_imported(code: str) -> None:
    print_modules = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\n{print_modules}"], capture_output=True, text=True, check=True
    )
    assert SLOW & set(ended.stdout.split()) == set()
