from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from safetensors import safe_open

from tests.conftest import Vitcompress, listing
from tests.factories import save_as_timm_does, tiny
from tests.forked import Command
from vitcompress import __version__
from vitcompress.artifact.load import load
from vitcompress.artifact.read import read_manifest
from vitcompress.cli import app as cli
from vitcompress.cli import exits
from vitcompress.recipe import STAGES, Recipe, flag_specs
from vitcompress.recipe.compose import build, to_dict
from vitcompress.runtime import console

COMMANDS = tuple(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
SIZE_KEYS = {
    "teacher_params", "student_params", "params_ratio", "teacher_bytes", "student_bytes", "bytes_ratio",
    "teacher_macs", "student_macs", "macs_ratio",
}  # fmt: skip
OLD = b"an older file of the user's"
CONVERT = ("--steps", 0, "--num-workers", 0, "--device", "cpu")


# --- answers at once


LIGHT: dict[str, list[str]] = {
    **{word: [word] for word in ("--help", "--version", "recipes")},
    **{f"{command} --help": [command, "--help"] for command in COMMANDS},
    "report": ["report", "FILE"],
    "compare": ["compare", "FILE", "FILE"],
    "diff": ["diff", "FILE", "FILE"],
    "check": ["check", "FILE", "--min-ratio", "1"],
}


@pytest.mark.broad
@pytest.mark.parametrize("words", LIGHT.values(), ids=LIGHT.keys())
def test_commands_that_need_no_model_import_neither_torch_nor_timm(words: list[str], made: Path) -> None:
    words = [str(made / "mini.safetensors") if word == "FILE" else word for word in words]
    code = (
        "import sys, atexit; from vitcompress.cli.app import main\n"
        "heavy = {'torch', 'timm', 'torchvision', 'accelerate', 'numpy', 'matplotlib'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & sys.modules.keys())))\n"
        f"sys.argv = ['vitcompress', *{words!r}]; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in ended.stdout
    assert ended.stderr == ""


def test_a_report_takes_at_most_twice_the_time_of_the_libraries_that_it_needs(made: Path) -> None:
    libraries = "import pydantic.dataclasses, rich.table, typer.rich_utils, yaml; from pydantic import TypeAdapter"
    commands = ["-c", libraries], ["-m", "vitcompress", "report", str(made / "mini.safetensors")]
    seconds: list[list[float]] = [[], []]
    for number in 2 * (0, 1) + 3 * (0, 1):  # in turn; processor time, for the machine may be busy
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *commands[number]], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds[number].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds[1]) < 2 * min(seconds[0])


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, vitcompress; assert not {'torch', 'timm', 'pydantic', 'typer'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_that_of_the_package(vitcompress: Vitcompress) -> None:
    ended = vitcompress("--version")
    assert (ended.code, ended.out.strip()) == (0, __version__)


# --- what can be typed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_help(command: str, vitcompress: Vitcompress) -> None:
    ended = vitcompress(command, "--help")
    assert ended.code == 0
    assert f" {command} " in ended.out


def test_compress_has_a_flag_for_every_field_of_the_recipe(
    vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = set(re.findall(r"--[a-z][a-z-]*", vitcompress("compress", "--help").out))
    expected = {f"--{spec.name.replace('_', '-')}" for spec in flag_specs(*STAGES) if spec.name != "model"}
    assert shown >= expected | {"--out", "--recipe"}


TYPED: list[tuple[list[object], dict[str, dict[str, Any]]]] = [
    (["--share", 3], {"plan": {"share": 3}}),
    (["--groups", "0-5,6-11"], {"plan": {"groups": "0-5,6-11"}}),
    (["--share-biases"], {"plan": {"share_biases": True}}),
    (["--no-share-biases"], {"plan": {"share_biases": False}}),
    (["--transforms", "none"], {"plan": {"transforms": []}}),
    (["--transforms", "mlp"], {"plan": {"transforms": ["mlp"]}}),
    (["--token-kernel", 5], {"plan": {"token_kernel": 5}}),
    (["--start", "calibrated", "--calibration-images", 9], {"start": {"start": "calibrated", "calibration_images": 9}}),
    (["--checkpoint", "w.pth"], {"model": {"checkpoint": "w.pth"}}),
    (
        ["--model-arg", "img_size=32", "--model-arg", "class-token=false", "--model-arg", "mlp_ratio=2.5"],
        {"model": {"model_arg": {"img_size": 32, "class_token": False, "mlp_ratio": 2.5}}},
    ),
    (["--mean", "0.1,0.2,0.3", "--std", "0.5"], {"model": {"mean": [0.1, 0.2, 0.3], "std": [0.5]}}),
    (["--interpolation", "bilinear", "--crop-pct", 1], {"model": {"interpolation": "bilinear", "crop_pct": 1.0}}),
    (
        ["--data", "a", "--val-data", "b", "--class-map", "c"],
        {"data": {"data": "a", "val_data": "b", "class_map": "c"}},
    ),
    (["--skip-bad-images", "--batch-size", 7], {"data": {"skip_bad_images": True, "batch_size": 7}}),
    (["--num-workers", 0], {"data": {"num_workers": 0}}),
    (["--steps", 0], {"distill": {"steps": 0}}),
    (["--epochs", 0.5], {"distill": {"epochs": 0.5}}),
    (["--max-minutes", 3], {"distill": {"max_minutes": 3.0}}),
    (["--lr", "3e-4", "--temperature", 2], {"distill": {"lr": 3e-4, "temperature": 2.0}}),
    (["--loss", "logits=1", "--loss", "hidden=0"], {"distill": {"loss": {"logits": 1.0, "hidden": 0.0}}}),
    (["--seed", 5, "--device", "cpu"], {"run": {"seed": 5, "device": "cpu"}}),
    (["--max-drop", 1, "--min-ratio", 9], {"gates": {"max_drop": 1.0, "min_ratio": 9.0}}),
    (["--max-size", "40MB"], {"gates": {"max_size": 40_000_000}}),
    (["--max-size", "1.5MiB"], {"gates": {"max_size": 1_572_864}}),
]


class Parsed(Exception):  # noqa: N818 - not an error: it carries what was parsed out of the command
    """Raised in the place of the work."""


def parse(vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch, *words: object) -> dict[str, Any]:
    def stop(resolved: Recipe, *args: Any, **kwargs: Any) -> None:
        raise Parsed(resolved)

    monkeypatch.setattr("vitcompress.pipeline.compress.compress", stop)
    with pytest.raises(Parsed) as caught:
        vitcompress("compress", *words, "--out", "x.safetensors")
    return to_dict(caught.value.args[0])


@pytest.mark.parametrize(
    ("words", "expected"), TYPED, ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else ""
)
def test_what_is_typed_is_what_the_recipe_says(
    words: list[object], expected: dict[str, Any], vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = parse(vitcompress, monkeypatch, "deit_tiny", *words)
    plain = to_dict(build({"model": "deit_tiny"}))
    assert found == {stage: {**fields, **expected.get(stage, {})} for stage, fields in plain.items()}


@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [
        ({"plan": {"share": 4}}, ["--share", 6], {"plan": {"share": 6}}),
        ({"plan": {"share": 4}}, ["--groups", "0-11"], {"plan": {"share": None, "groups": "0-11"}}),
        ({"distill": {"epochs": 2}}, ["--steps", 3], {"distill": {"steps": 3, "epochs": None}}),
        ({"plan": {"share": 4}, "run": {"seed": 9}}, ["--seed", 1], {"plan": {"share": 4}, "run": {"seed": 1}}),
        ({"plan": {"share_biases": True}}, ["--no-share-biases"], {"plan": {"share_biases": False}}),
        ({"plan": {"transforms": "none"}}, [], {"plan": {"transforms": []}}),
        ({"gates": {"max_size": "40MB"}}, [], {"gates": {"max_size": 40_000_000}}),
        ({"data": {"batch_size": 64}}, ["--batch-size", 128], {"data": {"batch_size": 128}}),
    ],
)
def test_a_flag_wins_over_the_recipe_file(
    file: dict[str, Any],
    words: list[object],
    expected: dict[str, dict[str, Any]],
    tmp_path: Path,
    vitcompress: Vitcompress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"model": {"model": "deit_small"}, **file}))
    found = parse(vitcompress, monkeypatch, "--recipe", path, *words)
    assert found["model"]["model"] == "deit_small"
    for stage, fields in expected.items():
        assert {name: found[stage][name] for name in fields} == fields
    assert parse(vitcompress, monkeypatch, "deit_tiny", "--recipe", path)["model"]["model"] == "deit_tiny"


def test_the_recipe_stored_in_a_file_makes_the_same_tensors_again(
    made: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    stored = read_manifest(made / "mini.safetensors").recipe
    (tmp_path / "r.yaml").write_text(json.dumps(stored))
    again = tmp_path / "again.safetensors"
    assert vitcompress("compress", "--recipe", tmp_path / "r.yaml", "--quiet", "--out", again).code == 0
    assert tensors(again) == tensors(made / "mini.safetensors")


def tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


@pytest.mark.thorough
@pytest.mark.parametrize(("optimizer", "num_workers"), [("adamw", 0), ("adamw", 1), ("muon", 0)])
def test_the_same_seed_makes_the_same_tensors(
    optimizer: str, num_workers: int, tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], images: Path
) -> None:
    words = ["--data", images, "--steps", 3, "--batch-size", 4, "--optimizer", optimizer, "--device", "cpu", "--quiet"]
    for name, workers, seed in (("a", 0, 1), ("b", num_workers, 1), ("c", 0, 2)):
        more = ["--num-workers", workers, "--seed", seed, "--out", tmp_path / f"{name}.safetensors"]
        assert vitcompress("compress", *teacher, *words, *more).code == 0
    assert tensors(tmp_path / "a.safetensors") == tensors(tmp_path / "b.safetensors")
    assert tensors(tmp_path / "a.safetensors") != tensors(tmp_path / "c.safetensors")


# --- what comes out, and where


def test_compress_prints_the_report_on_stdout_and_the_rest_on_stderr(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "MIN_STALL", 1.0)  # a busy machine is slow with images, too
    words = [
        "--data",
        images,
        "--steps",
        2,
        "--batch-size",
        4,
        "--num-workers",
        0,
        "--out",
        tmp_path / "mini.safetensors",
    ]
    ended = vitcompress("compress", *teacher, *words)
    assert ended.code == 0
    assert "distil" not in ended.out
    assert "top-1" in ended.out
    assert re.search(r"^distil 100 %  loss \d+\.\d+  \d+ images/s  0 s left$", ended.err, re.MULTILINE)
    assert "\x1b" not in ended.out + ended.err
    assert "\r" not in ended.err
    assert set(listing(tmp_path)) == {"mini.safetensors", "mini.report.json", "mini.report.md", "mini.report.svg"}


@pytest.mark.thorough
def test_quiet_leaves_only_the_result(made: Path, tmp_path: Path, vitcompress: Vitcompress, teacher: list[str]) -> None:
    ended = vitcompress("compress", *teacher, *CONVERT, "--quiet", "--out", tmp_path / "m.safetensors")
    assert (ended.code, ended.err) == (0, "")
    assert "parameters" in ended.out


def test_plan_prints_json_with_the_keys_of_the_report(vitcompress: Vitcompress) -> None:
    ended = vitcompress("plan", "deit_base", "--share", 12, "--json")
    tree = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert set(tree["size"]) == SIZE_KEYS
    assert tree["size"]["params_ratio"] >= 9.7


def test_plan_says_how_uneven_groups_fall(vitcompress: Vitcompress) -> None:
    assert "groups of 5+5+2" in " ".join(vitcompress("plan", "deit_tiny", "--share", 5).out.split())


def test_report_prints_what_was_written_beside_the_file(made: Path, vitcompress: Vitcompress) -> None:
    file = made / "mini.safetensors"
    printed = json.loads(vitcompress("report", file, "--json").out)
    assert printed == json.loads((made / "mini.report.json").read_text())
    assert set(printed["size"]) == SIZE_KEYS
    beside = [line for line in (made / "mini.report.md").read_text().splitlines() if not line.startswith("![")]
    typed = vitcompress(
        "report", file, "--markdown"
    ).out.splitlines()  # for a comment, which can show no file beside it
    assert [line for line in typed if line] == [line for line in beside if line]
    table = vitcompress("report", file)
    assert (table.code, table.err) == (0, "")
    assert "not faster" in table.out


@pytest.mark.thorough
def test_report_names_a_model_as_it_was_typed(made: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    folder = save_as_timm_does(tmp_path / "m[bold][v2]:smile:", tiny().state_dict())
    out = tmp_path / "m.safetensors"
    assert vitcompress("compress", f"local-dir:{folder}", *CONVERT, "--out", out).code == 0
    assert "m[bold][v2]:smile:" in vitcompress("report", out).out.replace("\n", "").replace(" ", "")


def test_evaluate_measures_a_labelled_folder(made: Path, images: Path, weights: Path, vitcompress: Vitcompress) -> None:
    words = ["--data", images, "--num-workers", 0, "--checkpoint", weights, "--json"]
    ended = vitcompress("evaluate", made / "mini.safetensors", *words)
    found = json.loads(ended.out)
    stored = read_manifest(made / "mini.safetensors").report["accuracy"]
    assert ended.code == 0
    assert {**found, "kl": None} == {**stored, "kl": None}
    assert found["kl"] == pytest.approx(stored["kl"], abs=1e-5)


def test_evaluate_compares_with_another_file(
    made: Path, mini: Path, images: Path, vitcompress: Vitcompress, no_network: None
) -> None:
    words = ["evaluate", made / "mini.safetensors", "--data", images, "--num-workers", 0, "--json"]
    found = json.loads(vitcompress(*words, "--teacher", mini).out)
    assert (found["agreement"], found["kl"], found["top1_drop"]) == (100.0, 0.0, 0.0)
    for more, named in (
        ([mini, "--checkpoint", mini], "is a file with its own weights"),
        (["deit_bsae"], "--teacher deit_bsae is"),
    ):
        ended = vitcompress("evaluate", made / "mini.safetensors", "--data", images, "--teacher", *more)
        assert (ended.code, "MODEL" in ended.err) == (2, False)
        assert named in ended.err


def test_evaluate_goes_on_without_a_teacher_and_says_so(
    made: Path, images: Path, no_network: None, vitcompress: Vitcompress
) -> None:
    ended = vitcompress("evaluate", made / "mini.safetensors", "--data", images, "--num-workers", 0, "--json")
    found = json.loads(ended.out)
    assert ended.code == 0
    assert "The teacher is not compared:" in ended.err
    assert (found["teacher_top1"], found["agreement"]) == (None, None)
    assert found["student_top1"] is not None


def test_unlabelled_images_give_agreement_and_never_accuracy(
    made: Path, flat: Path, weights: Path, vitcompress: Vitcompress
) -> None:
    words = ["--data", flat, "--num-workers", 0, "--checkpoint", weights]
    ended = vitcompress("evaluate", made / "mini.safetensors", *words)
    assert "agreement with the teacher" in ended.out
    assert "top-1" not in ended.out
    found = json.loads(vitcompress("evaluate", made / "mini.safetensors", *words, "--json").out)
    assert (found["student_top1"], found["num_images"]) == (None, 12)


# --- exit codes


@pytest.mark.parametrize(
    ("gates", "missed"),
    [
        (["--min-ratio", 1], []),
        (["--min-ratio", 99], ["missed: --min-ratio 99"]),
        (["--max-size", "1KB", "--min-ratio", 99], ["missed: --min-ratio 99", "missed: --max-size 1,000"]),
        (["--max-size", "40MB", "--max-drop", 100], []),
        (["--max-drop", -101], ["missed: --max-drop -101"]),
    ],
)
def test_check_says_which_gates_are_missed(
    gates: list[object], missed: list[str], made: Path, vitcompress: Vitcompress
) -> None:
    ended = vitcompress("check", made / "mini.safetensors", *gates)
    lines = ended.err.splitlines()
    assert ended.code == (3 if missed else 0)
    assert len(lines) == len(missed)
    assert all(line.startswith(begin) for line, begin in zip(lines, missed, strict=True))


def test_compress_writes_the_file_and_then_says_which_gates_are_missed(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], images: Path
) -> None:
    out = tmp_path / "mini.safetensors"
    size = json.loads(vitcompress("plan", *teacher, "--json").out)["size"]["student_bytes"]  # and there is a header
    words = ["--data", images, "--max-drop", -101, "--max-size", size, "--quiet", "--out", out]
    ended = vitcompress("compress", *teacher, *CONVERT, *words)
    assert (ended.code, len(ended.err.splitlines())) == (3, 2)
    assert load(out).num_classes == 5


@pytest.mark.parametrize(
    "words",
    [
        ["magic"],
        ["compress", "deit_tiny"],
        ["compress", "--out"],
        ["plan", "deit_tiny", "--magic"],
        ["plan", "deit_tiny", "--share", "two"],
        ["plan"],
        ["report"],
        ["check"],
    ],
    ids=" ".join,
)
def test_a_command_that_cannot_be_parsed_is_a_mistake(words: list[str], vitcompress: Vitcompress) -> None:
    ended = vitcompress(*words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err


def test_a_bug_is_not_dressed_up_as_a_mistake(vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("vitcompress.pipeline.plan.plan", crash)
    with pytest.raises(ZeroDivisionError):
        vitcompress("plan", "deit_tiny")


def test_an_interrupt_is_130_in_every_command(
    made: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for name in (
        "pipeline.plan.plan",
        "pipeline.compress.compress",
        "pipeline.evaluate.evaluate",
        "pipeline.pages.read_manifest",
    ):
        monkeypatch.setattr(f"vitcompress.{name}", interrupt)
    file = made / "mini.safetensors"
    for words in (["plan", "x"], ["compress", "x", "--out", "y"], ["evaluate", file], ["report", file]):
        ended = vitcompress(*words)
        assert (ended.code, ended.out) == (exits.EXIT_INTERRUPTED, "")
        assert "Interrupted" in ended.err


# --- Ctrl-C, as a terminal sends it


def interrupt(command: Command) -> tuple[int, str, str]:
    """Ctrl-C: the whole process group gets the signal."""
    command.send(signal.SIGINT, group=True)
    ended = command.ended(60)
    return ended.returncode, ended.stdout, ended.stderr


def training(*words: object) -> Command:
    """Start a command, and wait till it trains."""
    command = Command(*words, every_step=True)
    command.wait_for("\ndistil")
    return command


@pytest.mark.thorough
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ctrl_c_while_training_keeps_the_state_and_leaves_every_other_file_alone(
    num_workers: int, tmp_path: Path, teacher: list[str], images: Path
) -> None:
    out = tmp_path / "mini.safetensors"
    out.write_bytes(OLD)
    words = ["--data", images, "--batch-size", 4, "--num-workers", num_workers, "--device", "cpu", "--save-every", 3000]
    asked = ["compress", *teacher, *words, "--out", out]
    code, printed, err = interrupt(training(*asked, "--max-minutes", 2))
    assert (code, printed) == (130, "")
    assert "Traceback" not in err
    assert "Interrupted. Its state is in" in err.splitlines()[-1]
    states = tmp_path / "mini.checkpoints"
    assert {p.name for p in tmp_path.iterdir()} == {out.name, states.name}
    assert {p.name[:4] for p in states.iterdir()} == {"run.", "step"}
    assert out.read_bytes() == OLD


@pytest.mark.thorough
def test_ctrl_c_while_training_without_states_leaves_every_file_alone(
    tmp_path: Path, teacher: list[str], images: Path
) -> None:
    out = tmp_path / "mini.safetensors"
    out.write_bytes(OLD)
    words = ["--data", images, "--max-minutes", 2, "--batch-size", 4, "--num-workers", 2, "--device", "cpu"]
    code, printed, err = interrupt(training("compress", *teacher, *words, "--save-every", "none", "--out", out))
    assert (code, printed) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("Interrupted")
    assert listing(tmp_path) == {out.name: OLD}


@pytest.mark.parametrize("seconds", [0.2, 0.8])
def test_ctrl_c_before_training_is_as_clean(seconds: float, tmp_path: Path, teacher: list[str], images: Path) -> None:
    words = ["--data", images, "--max-minutes", 2, "--num-workers", 0, "--device", "cpu", "--save-every", "none"]
    command = Command("compress", *teacher, *words, "--out", tmp_path / "mini.safetensors")
    time.sleep(seconds)
    code, printed, err = interrupt(command)
    assert (code, printed) == (130, ""), err
    assert "Traceback" not in err
    assert listing(tmp_path) == {}


def check_interrupted(module: str, then: str, begin: str) -> None:
    """Ctrl-C during the import of a module, whatever the import makes of it, ends quietly."""
    code = (
        "import os, runpy, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: {then}\n"
        "def interrupt(): os.kill(os.getpid(), signal.SIGINT)\n"
        "def disguise():\n"
        "    try: interrupt(); time.sleep(9)\n"
        "    except BaseException: pass\n"
        "    raise RecursionError\n"  # so does numpy
        "sys.meta_path.insert(0, Stop())\n"
        "sys.argv = ['vitcompress', 'plan', 'deit_tiny']\n"
        f"{begin}"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("module", ["typer", "pydantic", "torch", "timm"])
def test_ctrl_c_while_modules_are_imported_is_as_clean(module: str) -> None:
    check_interrupted(module, "interrupt()", "runpy.run_module('vitcompress', run_name='__main__')")


def test_ctrl_c_that_a_library_makes_another_exception_of_is_as_clean() -> None:
    check_interrupted("timm", "disguise()", "from vitcompress.cli.app import main; main()")
