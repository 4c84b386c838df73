"""Run all benchmarks (`python -m tests.benchmarks`) or those named; `--list` shows their names."""

from __future__ import annotations

import argparse
import pkgutil
import sys
from importlib import import_module
from inspect import signature

from tests import benchmarks

NAMES = sorted(name for _, name, _ in pkgutil.iter_modules(benchmarks.__path__) if not name.startswith("_"))


def main(arguments: list[str]) -> None:
    """Run benchmarks and write their tables to stdout."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name them and run none")
    parser.add_argument("names", nargs="*", metavar="NAME", help="one of: " + ", ".join(NAMES))
    given = (index for index, word in enumerate(arguments) if index and word.startswith("-") and word != "--list")
    cut = next(given, len(arguments))  # from there on they are options of a benchmark
    asked, options = parser.parse_args(arguments[:cut]), arguments[cut:]
    unknown = [name for name in asked.names if name not in NAMES]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    modules = {name: import_module(f"tests.benchmarks.{name}") for name in asked.names or NAMES}
    if options and (len(modules) > 1 or not all(signature(module.run).parameters for module in modules.values())):
        parser.error(f"unrecognized arguments: {' '.join(options)}; options are of one benchmark that has some")
    for name, module in modules.items():
        title = (module.__doc__ or name).partition("\n")[0]
        table = "" if asked.list else module.run(options) if options else module.run()
        sys.stdout.write(f"{name}: {title}\n" if asked.list else f"## {title}\n\n{table}\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
