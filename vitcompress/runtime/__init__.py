"""How the program runs: console, events, signals, processes and optional packages."""
