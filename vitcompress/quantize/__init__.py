"""How weights are held in fewer bits, on disk and in memory."""
