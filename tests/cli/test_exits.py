"""How a command ends where another process of the run has failed."""

from __future__ import annotations

import pytest

from vitcompress.cli import exits

LOST = "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:33666."


def test_the_process_that_failed_says_why_and_the_others_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[None] = []
    monkeypatch.setattr(exits, "await_launcher", lambda: waits.append(None))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended, exits.user_errors():
        raise RuntimeError(LOST)
    assert (ended.value.code, len(waits)) == (1, 1)
    assert capsys.readouterr().err == "Error: The connection to the other processes is lost.\n"


@pytest.mark.parametrize(("size", "text"), [("1", LOST), ("2", "mat1 and mat2 shapes cannot be multiplied")])
def test_other_errors_stay_bugs(size: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(RuntimeError), exits.user_errors():
        raise RuntimeError(text)
