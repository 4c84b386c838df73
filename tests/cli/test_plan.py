"""`plan` keeps what it measured, uses it again, and shows where to stop; so does `compress`."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.conftest import ARCHITECTURE, Ended, Vitcompress, listing, model_flags
from tests.factories import tiny
from tests.report.pages import assert_safe
from tests.search.factories import ROOMY
from vitcompress.search import measure

SMALL = {**ROOMY, "depth": 3}
QUICK = ("--device", "cpu", "--calibration-images", 8, "--kinds", "narrow,skip", "-q")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """MODEL and its flags."""
    path = tmp_path_factory.mktemp("roomy") / "roomy.safetensors"
    save_file(tiny(**SMALL).state_dict(), path)
    return [ARCHITECTURE, *model_flags(**SMALL), "--checkpoint", str(path)]


def measuring(roomy: list[str], flat: Path) -> list[object]:
    return ["plan", *roomy, "--calibrate", flat, *QUICK]


def mistake(ended: Ended, *texts: str) -> None:
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    for text in texts:
        assert text in " ".join(ended.err.split())


@pytest.mark.thorough
def test_options_give_the_plans_of_measuring_anew(
    roomy: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "options.json"
    words = [*measuring(roomy, flat), "--json"]
    saved = vitcompress(*words, "--save", file)
    assert saved.code == 0, saved
    rows = json.loads(saved.out)
    assert {tuple(row) for row in rows} == {("kind", "scale", "blocks", "dial", "saved_params", "nats")}
    assert [path.name for path in tmp_path.iterdir()] == ["options.json"]
    anew = {ratio: json.loads(vitcompress(*words, "--target-ratio", ratio).out) for ratio in (1.5, 2, 3)}
    monkeypatch.setattr(measure, "block_moments", None)  # nothing is measured any more
    for ratio, plan in anew.items():
        found = json.loads(vitcompress(*words, "--target-ratio", ratio, "--options", file).out)
        assert found == plan
        assert found["size"]["params_ratio"] >= ratio


def test_a_target_saves_the_options_too(roomy: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    vitcompress(*measuring(roomy, flat), "--save", first)
    assert vitcompress(*measuring(roomy, flat), "--target-ratio", 2, "--save", second).code == 0
    assert first.read_bytes() == second.read_bytes()


def test_compress_uses_the_options(
    roomy: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "options.json"
    vitcompress(*measuring(roomy, flat), "--save", file)
    plan = json.loads(vitcompress(*measuring(roomy, flat), "--options", file, "--target-ratio", 2, "--json").out)
    monkeypatch.setattr(measure, "block_moments", None)
    out = tmp_path / "m.safetensors"
    ended = vitcompress(
        "compress", *roomy, "--data", flat, *QUICK[:-1], "--options", file, "--target-ratio", 2, "--steps", 0,
        "--num-workers", 0, "--out", out,
    )  # fmt: skip
    assert ended.code == 0, ended
    assert f"from {file}, not measured again" in ended.err
    made = json.loads((tmp_path / "m.report.json").read_text())
    assert made["made_of"] == plan["groups"]


def test_other_images_models_and_settings_are_refused_by_name(
    roomy: list[str], teacher: list[str], flat: Path, images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    file = tmp_path / "options.json"
    vitcompress(*measuring(roomy, flat), "--save", file)
    use = ["--options", file, "--target-ratio", 2]
    cases: list[tuple[list[object], str]] = [
        (["plan", *teacher, "--calibrate", flat, *QUICK], "model.sha256:"),
        (["plan", *roomy, "--calibrate", images, *QUICK], "training images:"),
        ([*measuring(roomy, flat), "--calibration-images", 4], "images fitted to: 4 images"),
        ([*measuring(roomy, flat), "--width-multiple", 4], "--width-multiple: 4, was 8"),
        ([*measuring(roomy, flat), "--transforms", "mlp"], "--transforms: mlp, was none"),
        ([*measuring(roomy, flat), "--mean", "0.1,0.2,0.3"], "preprocessing:"),
        ([*measuring(roomy, flat), "--kinds", "narrow,share"], "--kinds: share not measured, only narrow, skip"),
    ]
    for words, text in cases:
        mistake(vitcompress(*words, *use), "was measured on something else", text, "--save FILE measures them")
    fewer = vitcompress(*measuring(roomy, flat), "--kinds", "skip", "--options", file, "--target-ratio", 1.2)
    assert fewer.code == 0, fewer


def test_a_broken_file_is_refused_before_weights_are_loaded(
    roomy: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitcompress.pipeline.plan.load_weights", None)
    file = tmp_path / "options.json"
    for text, message in (('{"format": "vit', "cannot be read"), ("{}", "does not hold measured options")):
        file.write_text(text)
        mistake(vitcompress(*measuring(roomy, flat), "--options", file, "--target-ratio", 2), message)
    file.unlink()
    words = ["compress", *roomy, "--data", flat, "--target-ratio", 2, "--out", tmp_path / "m.safetensors"]
    mistake(vitcompress(*words, "--options", file), "does not exist")


def test_flags_that_do_not_fit_together_are_refused_at_once(
    roomy: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitcompress.pipeline.plan.load_weights", None)
    plan, calibrate = ["plan", *roomy], ["--calibrate", flat]
    (tmp_path / "folder").mkdir()
    cases: list[tuple[list[object], str]] = [
        (["--options", "o.json"], "--options needs a target or --frontier."),
        ([*calibrate, "--options", "o.json"], "--options needs a target or --frontier."),
        (["--frontier"], "--frontier needs measured options."),
        ([*calibrate, "--frontier", "--target-ratio", 2], "--frontier and --target-… cannot be used together."),
        (["--save", "o.json"], "--save: nothing is measured."),
        ([*calibrate, "--frontier", "--options", "a", "--save", "b"], "--save and --options cannot be used together."),
        ([*calibrate, "--resume"], "--resume needs --save"),
        ([*calibrate, "--plot", "a.svg"], "--plot needs --frontier."),
        ([*calibrate, "--frontier", "--plot", "a.png"], "drawings are .svg or .html."),
        ([*calibrate, "--frontier", "--plot", tmp_path / "none" / "a.svg"], "does not exist"),
        ([*calibrate, "--save", tmp_path / "folder"], "is a folder"),
        ([*calibrate, "--save", tmp_path / "none" / "o.json"], "does not exist"),
        ([*calibrate, "--save", tmp_path / "o.safetensors"], "hold weights"),
        ([*calibrate, "--save", roomy[-1]], "hold weights"),
    ]
    for words, text in cases:
        mistake(vitcompress(*plan, *words), text)
    both = vitcompress(*plan, *calibrate, "--plot", "a.svg", "--resume")
    mistake(both, "--plot needs --frontier.", "--resume needs --save")
    words = ["compress", *roomy, "--data", flat, "--options", "o.json", "--out", tmp_path / "m.safetensors"]
    mistake(vitcompress(*words), "--options needs a target.")


@pytest.mark.thorough
def test_the_frontier_is_printed_and_drawn(
    roomy: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    file, svg, html = tmp_path / "options.json", tmp_path / "f.svg", tmp_path / "f.html"
    ended = vitcompress(*measuring(roomy, flat), "--frontier", "--save", file, "--plot", svg)
    assert ended.code == 0, ended
    assert "target" in ended.out
    assert svg.read_text(encoding="utf-8").startswith("<?xml")
    words = [*measuring(roomy, flat), "--frontier", "--options", file, "--json"]
    rows = json.loads(vitcompress(*words, "--plot", html).out)
    assert_safe(html.read_text(encoding="utf-8"))
    assert "--frontier" in html.read_text(encoding="utf-8")
    assert {1.25, 1.5, 2.0} <= {row["target_ratio"] for row in rows if row["common_target"]}
    assert all(row["macs"] for row in rows)
    plan = json.loads(vitcompress(*measuring(roomy, flat), "--options", file, "--target-ratio", 2, "--json").out)
    (two,) = [row for row in rows if row["target_ratio"] == 2]
    assert (two["params"], two["bytes"], two["macs"]) == tuple(
        plan["size"][name] for name in ("student_params", "student_bytes", "student_macs")
    )
    halves = json.loads(vitcompress(*words, "--store", "fp16").out)
    (half,) = [row for row in halves if row["target_ratio"] == 2]
    assert (half["params"], 2 * half["bytes"]) == (two["params"], two["bytes"])


def interrupt_at(monkeypatch: pytest.MonkeyPatch, name: str, number: signal.Signals, call: int = 1) -> None:
    """Send a signal to this process in the n-th call of a function, named with its module."""
    original: Callable[..., Any] = pkgutil.resolve_name(name)
    calls: list[None] = []

    def interrupted(*args: Any, **more: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **more)

    monkeypatch.setattr(name, interrupted)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A process that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("where", "call", "number", "code"),
    [
        ("vitcompress.search.moments.run_recorded", 1, signal.SIGTERM, 143),
        ("vitcompress.search.measure.add_scores", 1, signal.SIGINT, 130),
        ("vitcompress.search.measure.make_context", 2, signal.SIGTERM, 143),
        ("vitcompress.search.measure.add_scores", 2, signal.SIGINT, 130),
    ],
)
@pytest.mark.broad
@pytest.mark.usefixtures("ctrl_c")
def test_plan_goes_on_after_an_interruption(
    where: str, call: int, number: signal.Signals, code: int, roomy: list[str], flat: Path, tmp_path: Path,
    vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, file = tmp_path / "whole.json", tmp_path / "options.json"
    vitcompress(*measuring(roomy, flat), "--save", whole)
    words = [*measuring(roomy, flat)[:-1], "--save", file]
    with monkeypatch.context() as patch:
        interrupt_at(patch, where, number, call)
        ended = vitcompress(*words)
    assert ended.code == code, ended
    part = f"{file}.part"
    assert f"What was measured is in {part}: the same command with --resume continues from there." in ended.err
    assert sorted(listing(tmp_path)) == ["options.json.part", "whole.json"]
    mistake(vitcompress(*words, "--resume", "--width-multiple", 4), "--width-multiple: 4, was 8")
    ended = vitcompress(*words, "--resume")
    assert ended.code == 0, ended
    assert f"continuing the measurement from {part}" in ended.err
    assert sorted(listing(tmp_path)) == ["options.json", "whole.json"]
    assert file.read_bytes() == whole.read_bytes()


def test_without_resume_a_measurement_starts_over(
    roomy: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    (tmp_path / "options.json.part").write_bytes(b"rubbish")
    words = [*measuring(roomy, flat), "--save", tmp_path / "options.json"]
    mistake(vitcompress(*words, "--resume"), "options.json.part cannot be read", "Leave out --resume to start over.")
    assert vitcompress(*words).code == 0
    assert sorted(listing(tmp_path)) == ["options.json"]


@pytest.mark.thorough
@pytest.mark.usefixtures("ctrl_c")
def test_compress_goes_on_after_interruptions(
    roomy: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once while it measures, once while it builds the candidates."""
    whole, out, folder = tmp_path / "whole.safetensors", tmp_path / "m.safetensors", tmp_path / "m.checkpoints"
    words: list[object] = [
        "compress", *roomy, "--data", flat, *QUICK[:-1], "--target-ratio", 2, "--steps", 0, "--num-workers", 0,
    ]  # fmt: skip
    vitcompress(*words, "--out", whole)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "vitcompress.search.moments.run_recorded", signal.SIGTERM)
        ended = vitcompress(*words, "--out", out)
    assert ended.code == 143, ended
    assert f"What was measured is in {folder / 'search.safetensors'}" in ended.err
    assert sorted(listing(folder)) == ["search.safetensors"]
    mistake(vitcompress(*words, "--out", out, "--resume", "--seed", 1), "images fitted to:")

    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("vitcompress.search.build.divergence", interrupted)
        ended = vitcompress(*words, "--out", out, "--resume")
    assert ended.code == 130, ended
    assert f"continuing the measurement from {folder / 'search.safetensors'}" in ended.err
    assert f"The measured options are in {folder / 'options.json'}" in ended.err
    assert sorted(listing(folder)) == ["options.json"]

    monkeypatch.setattr(measure, "block_moments", None)
    ended = vitcompress(*words, "--out", out, "--resume")
    assert ended.code == 0, ended
    assert f"continuing from the options in {folder / 'options.json'}" in ended.err
    assert not folder.exists()
    reports = [json.loads(file.with_suffix(".report.json").read_text()) for file in (whole, out)]
    assert reports[0]["made_of"] == reports[1]["made_of"]
    assert reports[0]["why"] == reports[1]["why"]


@pytest.mark.usefixtures("ctrl_c")
def test_a_search_in_limited_time_goes_on_with_as_many_images(
    roomy: list[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.safetensors"
    words: list[object] = [
        "compress", *roomy, "--data", flat, "--device", "cpu", "--kinds", "narrow", "--target-ratio", 2,
        "--max-minutes", 0.05, "--batch-size", 4, "--num-workers", 0, "--out", out,
    ]  # fmt: skip
    for where in ("search.moments.run_recorded", "search.build.divergence"):
        with monkeypatch.context() as patch:
            patch.setattr("vitcompress.pipeline.start.search_images", lambda run, source: 6)
            interrupt_at(patch, f"vitcompress.{where}", signal.SIGTERM)
            assert vitcompress(*words, *(["--resume"] if out.with_suffix(".checkpoints").exists() else [])).code == 143
        monkeypatch.setattr("vitcompress.pipeline.start.search_images", lambda run, source: 5)
    ended = vitcompress(*words, "--resume")
    assert ended.code == 0, ended
    assert "fitted to 6 images" in ended.err
