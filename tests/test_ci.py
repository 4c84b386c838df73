"""The script of docs/how-to/ci.md runs, and its workflows are well formed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "how-to" / "ci.md").read_text(encoding="utf-8")
SCRIPT = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)[0]
GITHUB, GITLAB = (yaml.load(text, yaml.BaseLoader) for text in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))


def run(script: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a CI machine does: no terminal, no input, `vitcompress` on the path."""
    (folder / "bin").mkdir(exist_ok=True)
    command = folder / "bin" / "vitcompress"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vitcompress "$@"\n')
    command.chmod(0o755)
    (folder / "compress.sh").write_text(script)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "compress.sh", *words], cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_script_keeps_its_report_whether_the_gates_are_met_or_not(tmp_path: Path) -> None:
    words = ("--steps", "0", "--no-baselines", "--device", "cpu", "--num-workers", "0")
    ended = run(SCRIPT, tmp_path, *words)
    assert ended.returncode == 3, ended.stderr
    assert [line for line in ended.stderr.splitlines() if line.startswith("missed: --max-drop 2.5")]
    assert "\x1b" not in ended.stdout + ended.stderr
    out = tmp_path / "out"
    comment = (out / "comment.md").read_text(encoding="utf-8")
    assert "fashion_vit" in comment
    assert "![" not in comment
    assert json.loads((out / "report.json").read_text())["model"] == "fashion_vit"
    events = [json.loads(line)["event"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert (events[0], events[-1]) == ("start", "end")
    assert "evaluate" in events
    met = run(SCRIPT.replace("--max-drop 2.5", "--max-drop 100"), tmp_path, *words)
    assert met.returncode == 0, met.stderr
    assert met.stdout.endswith("every gate is met\n")


@pytest.mark.thorough
def test_the_script_stops_at_a_mistake(tmp_path: Path) -> None:
    ended = run(SCRIPT.replace("fashion_vit", "fashion_bit"), tmp_path)
    assert ended.returncode == 2
    assert "fashion_bit is unknown" in ended.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.jsonl"]


def steps_of(tree: dict[str, Any]) -> list[dict[str, Any]]:
    (job,) = tree["jobs"].values()
    assert job["runs-on"]
    assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    return list(job["steps"])


def test_the_workflow_for_github() -> None:
    steps = steps_of(GITHUB)
    assert set(GITHUB) == {"name", "on", "permissions", "concurrency", "jobs"}
    assert [step["run"].split()[0] for step in steps if "run" in step] == ["pip", "sh", "gh"]
    comment, upload = steps[-2:]
    assert "out/comment.md" in comment["run"]
    assert GITHUB["permissions"]["pull-requests"] == "write"  # gh may not comment without
    assert upload["with"]["path"] == "out/"
    assert all("!cancelled()" in step["if"] for step in (comment, upload))  # after a missed gate too
    assert not re.search(r"\$\{\{[^}]*(title|body|head_ref)", TEXT)  # what a stranger writes is not run


def test_the_workflow_for_gitlab(tmp_path: Path) -> None:
    job = GITLAB["compress"]
    assert set(job) <= {
        "image", "timeout", "rules", "variables", "cache", "script", "after_script", "artifacts",
    }  # fmt: skip
    assert job["script"][-1] == "sh compress.sh"
    assert (job["artifacts"]["when"], job["artifacts"]["paths"]) == ("always", ["out/"])
    (after,) = job["after_script"]
    subprocess.run(["sh", "-n", "-c", after], check=True)
    calls = tmp_path / "calls"
    (tmp_path / "curl").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {calls}\n')
    (tmp_path / "curl").chmod(0o755)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comment.md").write_text("report")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CI_API_V4_URL": "https://host/api/v4", "CI_PROJECT_ID": "7"}
    subprocess.run(["sh", "-euc", after], cwd=tmp_path, env=env, check=True)
    assert not calls.exists()  # on a branch there is nothing to comment
    env |= {"CI_MERGE_REQUEST_IID": "3", "COMMENT_TOKEN": "t"}
    subprocess.run(["sh", "-euc", after], cwd=tmp_path, env=env, check=True)
    assert calls.read_text().splitlines()[-1] == "https://host/api/v4/projects/7/merge_requests/3/notes"
