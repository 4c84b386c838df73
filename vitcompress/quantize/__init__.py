"""Quantization: weights in fewer bits, in files and in memory."""
