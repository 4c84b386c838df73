"""The verbs of the program, one file each: the only place where stages meet."""
