"""A signal is neither lost nor reported by the wrong process."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap


def run(code: str) -> tuple[str, str]:
    """Return what a program prints on stdout and on stderr."""
    words = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return ended.stdout.strip(), ended.stderr


def test_a_signal_in_a_destructor_is_not_lost() -> None:
    code = """
        import os, signal, time
        from vitcompress.runtime import signals

        class Freed:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                "the handler runs".split()

        signals.watch()
        try:
            Freed()
            time.sleep(30)
        except signals.TerminationError:
            print("terminated")
    """
    assert run(code) == ("terminated", "")


def test_a_worker_without_handlers_of_its_own_ends_silently() -> None:
    code = """
        import multiprocessing, time
        from vitcompress.runtime import signals

        signals.watch()
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        worker.start()
        time.sleep(0.1)
        worker.terminate()
        worker.join()
        print(worker.exitcode)
    """
    assert run(code) == (str(-signal.SIGTERM), "")


def test_a_second_sigterm_ends_even_what_defers_the_first_one() -> None:
    code = """
        import os, signal, sys, time
        from vitcompress.runtime import signals

        def terminate():
            os.kill(os.getpid(), signal.SIGTERM)
            "the handler runs".split()

        signals._DELIBERATE_SECONDS = 0.5
        signals.watch()
        try:
            with signals.deferring(ctrl_c=False) as received:
                terminate()
                terminate()  # a launcher and a process group may both send it
                print("deferred", received())
                time.sleep(0.6)
                terminate()
                print("too late")
        except signals.TerminationError:
            print("terminated")
    """
    assert run(code) == ("deferred True\nterminated", "")
