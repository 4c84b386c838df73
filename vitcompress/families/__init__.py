"""What is particular to each architecture: one file per family, and the table of them in `find`."""
