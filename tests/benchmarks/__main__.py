"""`python -m tests.benchmarks` runs every benchmark, `… NAME` some of them, `… --list` none."""

from __future__ import annotations

import argparse
import pkgutil
import sys
from importlib import import_module

from tests import benchmarks


def main(arguments: list[str]) -> None:
    """Run benchmarks and write their tables to stdout."""
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name != "__main__")
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name them and run none")
    parser.add_argument("names", nargs="*", metavar="NAME", help="one of: " + ", ".join(names))
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.names if name not in names]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(names)}")
    for name in asked.names or names:
        module = import_module(f"tests.benchmarks.{name}")
        title = (module.__doc__ or name).partition("\n")[0]
        sys.stdout.write(f"{name}: {title}\n" if asked.list else f"## {title}\n\n{module.run()}\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
