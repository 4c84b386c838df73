"""Measure accuracy, latency, multiply-accumulates and baselines."""
