"""Benchmarks: a module's docstring says what it measures; `run()` returns a Markdown table."""
