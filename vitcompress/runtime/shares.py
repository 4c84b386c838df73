"""Tell the progress of one part of a piece of work as progress of the whole."""

from __future__ import annotations

from collections.abc import Callable


def part_of(tell: Callable[[float], None], first: float, last: float) -> Callable[[float], None]:
    """Return a function to call with the share of one part of the work that is done, 0–1.

    Args:
        tell: called with the share of the whole work that is done.
        first: that share when the part begins.
        last: that share when the part ends.
    """
    return lambda done: tell(min(last, first + (last - first) * done))
