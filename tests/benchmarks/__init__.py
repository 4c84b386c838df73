"""What is measured rather than asserted: a module's docstring says what, its `run()` gives the table in Markdown."""
