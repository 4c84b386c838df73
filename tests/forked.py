"""Run the command line in a process forked off one that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# vitcompress itself is not among them: it notes when it is imported, and so when a command began
_CONTEXT.set_forkserver_preload(["timm", "accelerate", "scipy.optimize", "jinja2", "yaml", "typer", "rich.console"])


class Command:
    """`vitcompress` with words, begun; the leader of a process group, as a shell would have it."""

    def __init__(self, *words: object, every_step: bool = False) -> None:
        """Start it.

        Args:
            words: what would be typed.
            every_step: let it say something at every step, not now and then.
        """
        self._folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._process = _CONTEXT.Process(
            target=_run, args=([*map(str, words)], self._folder, every_step, dict(os.environ))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code; minus a signal's number where that ended it; None while it runs."""
        return self._process.exitcode

    def send(self, number: int, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def said(self, stream: str = "stderr") -> str:
        """What it has written so far."""
        path = self._folder / stream
        return path.read_text() if path.exists() else ""

    def wait_for(self, what: Path | str) -> None:
        """Wait until a file is there, or a text on stderr."""
        end = time.monotonic() + 120
        while not (what.exists() if isinstance(what, Path) else what in self.said()):
            assert self.code is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def ended(self, seconds: float = 300) -> CompletedProcess[str]:
        """Wait for its end."""
        self._process.join(seconds)
        assert self.code is not None, self.said()
        return CompletedProcess((), self.code, self.said("stdout"), self.said())


def _run(words: list[str], folder: Path, every_step: bool, environment: dict[str, str]) -> None:
    os.environ.clear()  # the server has that of the test which started it
    os.environ.update(environment)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    for stream, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["vitcompress", *words]
    from vitcompress.__main__ import main
    from vitcompress.runtime import console

    if every_step:
        setting: Any = console
        setting.SECONDS_BETWEEN_LINES = 0
    code = None
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    sys.exit(code)  # anew: the other holds what main() used, workers too, which are waited for
