"""The commands that read files without their weights: `report`, `compare`, `diff`, `check`.

They import neither torch nor timm, except for images in a page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitcompress.cli.output import Results, exit_on_missed, put, put_json, reporting
from vitcompress.cli.recipe_flags import (
    IMAGE_FLAGS,
    CheckpointKeyOption,
    CheckpointOption,
    FileArgument,
    HtmlOption,
    JsonOption,
    LogOption,
    takes,
)
from vitcompress.errors import VitcompressError
from vitcompress.pipeline import pages
from vitcompress.recipe import compose, flag_of
from vitcompress.report.gates import missed_gates
from vitcompress.report.model import to_json
from vitcompress.report.terminal import print_report
from vitcompress.runtime.console import Reporter


@takes(
    "data",
    only=IMAGE_FLAGS,
    helps={
        "data": "Images to show examples from: a folder, wds:SHARDS, hfds:DIR, torch/NAME:DIR or built-in.",
        "batch_size": "Images per batch. Default: 128.",
    },
)
def report(
    file: FileArgument,
    flags: dict[str, Any],
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    html: HtmlOption = None,
    checkpoint: CheckpointOption = None,
    checkpoint_key: CheckpointKeyOption = None,
) -> None:
    """Show the report stored in a file.

    With --html and --data, the page has images on which the file differs from its teacher.
    """
    named = {"--checkpoint": checkpoint, "--checkpoint-key": checkpoint_key}
    typed = [*map(flag_of, flags), *(flag for flag, value in named.items() if value is not None)]
    if typed and html is None:
        raise VitcompressError(f"{typed[0]} requires --html.", hint="Give --html FILE, or use vitcompress evaluate.")
    if typed and "data" not in flags:
        raise VitcompressError(f"{typed[0]} requires --data.", hint="Give --data DIR.")
    result = pages.result_of(file, named_classes=html is not None)
    if html is not None:
        pages.check_page(html, [file], checkpoint)
    if as_json:
        put_json(to_json(result.report))
    elif markdown:
        from vitcompress.report.markdown import to_markdown

        put(to_markdown(result.report))
    elif html is None:
        print_report(result.report, Results())
    if html is not None:
        from vitcompress.report.page import to_html

        data = compose.build({"model": "", **flags}).data
        reporter = Reporter()
        examples = None
        if flags:
            examples = pages.examples_of(
                file, data, checkpoint=checkpoint, checkpoint_key=checkpoint_key, reporter=reporter
            )
        pages.write_page(html, to_html(result, examples), reporter)


def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Two or more vitcompress files.")],
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show several files side by side: sizes, accuracies, latencies."""
    if len(files) < 2:
        raise VitcompressError("There is only one file to compare.", hint="vitcompress report FILE shows it.")
    from vitcompress.report.compare import compared_html, print_compared

    if html is not None:
        pages.check_page(html, files)
    results = [pages.result_of(file, named_classes=html is not None) for file in files]
    if html is not None:
        pages.write_page(html, compared_html(results), Reporter())
    if as_json:
        put_json([{"file": r.name, "file_bytes": r.file_bytes, **to_json(r.report)} for r in results])
    elif html is None:
        print_compared(results, list(map(str, files)), Results())


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A vitcompress file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another file.")],
    as_json: JsonOption = False,
) -> None:
    """Show how two files differ: plan, recipe, numbers, versions."""
    from vitcompress.report.diff import differences, print_differences

    rows = differences(pages.result_of(first), pages.result_of(second))
    if as_json:
        put_json([row._asdict() for row in rows])
    else:
        print_differences(rows, (str(first), str(second)), Results())


@takes("gates")
def check(file: FileArgument, flags: dict[str, Any], log_json: LogOption = None) -> None:
    """Check a file against quality gates.

    If any is missed, print one line for each and exit with code 3.
    """
    with reporting(log_json) as reporter:
        gates = compose.build({"model": "", **flags}).gates
        if not flags:
            raise VitcompressError("There is no gate to check.", hint="Give --max-drop, --min-ratio or --max-size.")
        result = pages.result_of(file)
        exit_on_missed(missed_gates(result.report, gates, file_bytes=result.file_bytes), reporter)
        put("every gate is met")
