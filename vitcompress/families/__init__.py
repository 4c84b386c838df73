"""Architecture-specific knowledge: one file per family, and the table of families in `find`."""
