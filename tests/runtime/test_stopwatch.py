"""The laps of a command add up, and none is negative."""

import pytest

from vitcompress.runtime.stopwatch import Stopwatch


def test_laps_add_up_and_a_clock_that_is_set_back_takes_nothing_away(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((103.0, 104.0, 50.0, 57.0))
    monkeypatch.setattr("time.time", lambda: next(times))
    clock = Stopwatch(started=100.0)
    for name in ("loading", "training", "training", "loading"):
        clock.lap(name)
    assert clock.laps == {"loading": 10.0, "training": 1.0}
