"""Test whether a model is better than chance on labeled images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from scipy.special import bdtrc

SIGNIFICANCE = 0.01  # of one-sided tests


def at_least(hits: int, count: int, probability: float) -> float:
    """Return the probability of at least `hits` successes in `count` independent trials."""
    return 1.0 if hits <= 0 else float(bdtrc(hits - 1, count, probability))


def top1_of_chance(labels: Iterable[int], num_classes: int) -> float:
    """Return the share of images that a guess classifies correctly, 0–1.

    This is the share of the commonest class; of images of one class, 1/K.

    Args:
        labels: class index of each image.
        num_classes: number K of the model's classes.
    """
    counts = Counter(labels)
    return max(counts.values()) / counts.total() if len(counts) > 1 else 1 / num_classes
