"""The command line: every command, one module each.

Commands import torch and timm when they run: `--help` and `--version` answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

import vitcompress
from vitcompress.cli import recipes
from vitcompress.cli.compress import compress
from vitcompress.cli.doctor import doctor
from vitcompress.cli.evaluate import evaluate
from vitcompress.cli.exits import say, user_errors
from vitcompress.cli.export import export
from vitcompress.cli.finetune import finetune
from vitcompress.cli.models import models
from vitcompress.cli.output import put
from vitcompress.cli.plan import plan
from vitcompress.cli.report import check, compare, diff, report
from vitcompress.runtime import signals
from vitcompress.runtime.console import notices
from vitcompress.runtime.encoding import encode_what_can_be

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line."""
    encode_what_can_be(sys.stdout, sys.stderr)
    signals.watch()
    with user_errors(), notices(say):
        app()


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Compress pretrained Vision Transformers: fewer parameters, smaller files."""
    if version:
        put(vitcompress.__version__)
        raise typer.Exit
    for name in ("accelerate", "matplotlib", "timm", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)  # their notices would appear between our lines
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it also prints retries; errors are reported by us


for command in (compress, finetune, plan, report, compare, diff, evaluate, check, export, doctor, models):
    app.command()(user_errors()(command))
app.add_typer(recipes.app, name="recipes")
