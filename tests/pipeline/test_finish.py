"""What is written where a file exceeds its target by its header alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.report.samples import REPORT
from vitcompress.distill.log import TrainLog
from vitcompress.pipeline import finish

POINTS = tuple({"step": float(step), "lr": 1e-3, "loss": 1.0} for step in range(1, 80))


@pytest.mark.parametrize(
    ("limit", "points", "message"),
    [(None, 79, ""), (7900, 79, ""), (7899, 40, "half of the loss curve"), (1500, 10, "is missed")],
)
def test_the_loss_curve_gives_way_to_a_target_size(
    limit: int | None, points: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def write(out: Path, student: Any, tensors: Any, manifest: Any, report: Any, reporter: Any) -> None:
        written.append(len(report.train.loss_curve))
        out.write_bytes(bytes(100 * written[-1] if limit != 1500 else 2000))

    for name in ("described", "to_dict", "Manifest"):
        monkeypatch.setattr(finish, name, lambda *args, **kwargs: {})
    monkeypatch.setattr(finish, "write_result", write)
    said: list[str] = []
    target = SimpleNamespace(target=SimpleNamespace(target_size=limit))
    run: Any = SimpleNamespace(
        recipe=target,
        source=None,
        plan=None,
        config={},
        classes=(),
        lineage=(),
        reporter=SimpleNamespace(say=said.append),
    )
    report = replace(REPORT, train=TrainLog(steps=79, loss_curve=POINTS))
    result = finish._write(run, SimpleNamespace(), {}, "", report, tmp_path / "m.safetensors")  # type: ignore[arg-type]
    assert len(result.train.loss_curve) == points == written[-1]
    assert message in " ".join(said)
    assert result.train.loss_curve[-1] == POINTS[-1]  # the last point stays
