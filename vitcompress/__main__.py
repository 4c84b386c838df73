"""The console script, and `python -m vitcompress`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while its modules are still being imported ends as quietly as later."""
    try:
        from vitcompress import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
