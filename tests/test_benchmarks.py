import time
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from tests.benchmarks import speed
from tests.benchmarks.__main__ import NAMES, main
from tests.benchmarks.relation_memory import PeakBytes


def test_the_peak_counts_what_is_alive_at_once() -> None:
    a = torch.zeros(250)
    with PeakBytes() as peak:
        b = a + 1  # 1000 bytes
        c = b + 1  # 2000
        del b  # 1000
        d = c.view(10, 25) + 1  # 2000, for a view is no tensor of its own
        d.add_(1)
        assert (peak.alive, peak.peak) == (2000, 2000)
        del c, d
    assert peak.alive == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_says_what_it_measures_and_can_be_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = import_module(f"tests.benchmarks.{name}")
    assert callable(module.run)
    main(["--list", name])
    assert capsys.readouterr().out == f"{name}: {str(module.__doc__).splitlines()[0]}\n"


def test_ratios_are_of_pairs_and_the_first_pass_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that follows the works: 30 against 10 seconds, then 20 against 10, 100 against 20."""
    now = [0.0]
    ours, floor = iter([999.0, 30.0, 20.0, 100.0]), iter([999.0, 10.0, 10.0, 20.0])

    def work(seconds: Iterator[float]) -> None:
        now[0] += next(seconds)

    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(time, clock, lambda: now[0])
    ratios = speed.compare_times(lambda: work(ours), lambda: work(floor), pairs=3)
    assert (ratios.median, ratios.quartiles, ratios.cpu) == (3.0, (2.5, 4.0), 3.0)
    assert str(ratios) == "3.00 (2.50–4.00) | 3.00"


def test_a_benchmark_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "no such benchmark: nonsense" in capsys.readouterr().err
