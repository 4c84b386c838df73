"""The console script, and `python -m vitcompress`."""

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line; Ctrl-C while its modules are still being imported ends as quietly as later."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a library that is being imported may turn the exception into another
        signal.signal(signal.SIGINT, _leave)
    from vitcompress.cli import app as cli

    signal.signal(signal.SIGINT, before)
    cli.main()


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(130)  # nothing has been written or begun


if __name__ == "__main__":
    main()
