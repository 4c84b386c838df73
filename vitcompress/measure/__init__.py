"""How good, how fast and how much to compute a model is."""
