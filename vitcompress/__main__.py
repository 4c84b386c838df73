"""The console script, and `python -m vitcompress`."""

import os
import signal


def main() -> None:
    """Run the command line; Ctrl-C while its modules are imported ends quietly."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore Ctrl-C
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # nothing has been written yet
    from vitcompress.cli import app

    app.main()


if __name__ == "__main__":
    main()
