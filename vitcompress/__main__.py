"""`python -m vitcompress` is `vitcompress`."""

from vitcompress.cli import main

main()
