"""Several processes: who starts them, which one this is, and what all of them agree on."""
