"""Measure where the time of a command goes."""

from __future__ import annotations

import time


class Stopwatch:
    """Divides the time since the start of a command into laps.

    Args:
        started: when the command started, in seconds since 1970; now by default.
    """

    def __init__(self, started: float | None = None) -> None:
        self.started = self._last = time.time() if started is None else started
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Add the seconds since the last lap to `name`."""
        now = time.time()
        self.laps[name] = self.laps.get(name, 0.0) + max(0.0, now - self._last)  # clocks are set back, too
        self._last = now
