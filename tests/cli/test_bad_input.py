"""A mistake ends with exit code 2, names what is wrong, and leaves and harms no file."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.artifact.helpers import HARM
from tests.conftest import ARCHITECTURE, Ended, Vitcompress, draw_image, listing, model_flags
from tests.factories import ARGS, tiny
from vitcompress.artifact.read import read_manifest

Weights = dict[str, Tensor]
OLD = b"an older file of the user's"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where to write, over older files; afterwards the folder must be as it was."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("mini.safetensors", "mini.report.json", "mini.report.md"):
        (folder / name).write_bytes(OLD)
    before = listing(folder)
    yield folder / "mini.safetensors"
    assert listing(folder) == before


def mistake(ended: Ended, *named: object) -> None:
    assert ended.code == 2, ended
    assert ended.err.count("Error:") == 1
    assert "Traceback" not in ended.err
    assert ended.out == ""
    for text in named:
        assert str(text) in ended.err


FAST = ("--steps", 1, "--batch-size", 4, "--num-workers", 0, "--device", "cpu")


# --- models and plans


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["diet_base"], ["MODEL diet_base is unknown", "deit_base"]),
        (["resnet18"], ["resnet18 is a ResNet", "Hint:", "deit_small"]),
        (["convnext_tiny"], ["convnext_tiny is a ConvNeXt"]),
        (["deit_smal"], ["could be any of", "deit_small_patch16_224"]),
        (["local-dir:nowhere"], ["local-dir:nowhere"]),
        (["vit_tiny", "--share", "0"], ["--share 0"]),
        (["vit_tiny", "--share", "-3"], ["--share -3"]),
        (["vit_tiny", "--share", "13"], ["--share 13", "12 blocks"]),
        (["vit_tiny", "--groups", "0-5,4-11"], ["--groups", "4-11 overlaps"]),
        (["vit_tiny", "--groups", "0-3,6-11"], ["--groups", "6-11 skips block 4"]),
        (["vit_tiny", "--groups", "1-11"], ["--groups", "1-11 skips block 0"]),
        (["vit_tiny", "--groups", "0-3,11-4"], ["--groups", "11-4 runs backwards"]),
        (["vit_tiny", "--groups", "6-11,0-5"], ["--groups", "6-11 skips block 0", "0-5 overlaps"]),
        (["vit_tiny", "--groups", "0-3,4-7"], ["--groups", "blocks 8-11 are in no group"]),
        (["vit_tiny", "--groups", "0-12"], ["--groups", "0-12 goes past the last block, 11"]),
        (["vit_tiny", "--groups", "0-5,,6-11"], ["--groups", "''"]),
        (["vit_tiny", "--groups", "a-b"], ["--groups", "'a-b'"]),
        (["vit_tiny", "--groups", ""], ["--groups"]),
        (
            ["vit_tiny", "--share", "2", "--groups", "0-5,6-11"],
            ["--share and --groups cannot be used together. Give only one of them"],
        ),
        (["vit_tiny", "--transforms", "magic"], ["--transforms", "magic"]),
        (
            ["vit_tiny", "--adapter-rank", "193"],
            ["--adapter-rank 193", "rank 192 at most", "Use at most --adapter-rank 192"],
        ),
        (["vit_tiny", "--basis", "193", "--no-matrices"], ["--basis 193", "rank 192 at most"]),
        (["vit_tiny", "--adapter-rank", "0"], ["--adapter-rank 0"]),
        (["vit_tiny", "--basis", "-1"], ["--basis -1"]),
        (["vit_tiny", "--share", "1", "--adapter-rank", "2"], ["--adapter-rank 2", "nothing to add", "--no-matrices"]),
        (["vit_tiny", "--share", "1", "--basis", "2"], ["--basis 2", "nothing to add"]),
        (["vit_tiny", "--no-matrices"], ["--no-matrices needs --adapter-rank or --basis"]),
        (["vit_tiny", "--no-matrices", "--width", "0.5"], ["--no-matrices needs"]),
        (
            ["vit_tiny", "--adapter-rank", "2", "--basis", "2"],
            ["--adapter-rank and --basis cannot be used together. Give only one of them"],
        ),
        (
            ["vit_tiny", "--adapter-rank", "2", "--width", "0.5"],
            ["--adapter-rank and --width cannot be used together. Give only one of them"],
        ),
        (["vit_tiny", "--width", "0"], ["--width 0"]),
        (["vit_tiny", "--width", "1"], ["--width 1"]),
        (["vit_tiny", "--width", "nan"], ["--width"]),
        (["vit_tiny", "--width", "0.5", "--transforms", "rpe"], ["--transforms rpe", "--width"]),
        (["eva02_base_patch14_224", "--width", "0.5"], ["--width 0.5", "neither a plain MLP nor plain attention"]),
        (["vit_tiny", "--pattern", "magic"], ["--pattern magic"]),
        (
            ["vit_tiny", "--pattern", "cycle", "--groups", "0-5,6-11"],
            ["--pattern and --groups cannot be used together. Give only one of them"],
        ),
        (["vit_tiny", "--token-kernel", "4"], ["--token-kernel 4", "odd"]),
        (["vit_tiny", "--model-arg", "depth"], ["--model-arg", "key=value"]),
        (["vit_tiny", "--model-arg", "img_size=[1"], ["--model-arg", "img_size"]),
        (["vit_tiny", "--model-arg", "depth=0"], ["0 blocks"]),
        (["vit_tiny", "--model-arg", "no_such=1"], ["no_such"]),
        (["vit_tiny", "--model-arg", "features_only=true"], ["Hint:"]),
        (["vit_tiny", "--model-arg", "checkpoint_path=x"], ["--model-arg checkpoint_path"]),
        (["vit_tiny", "--mean", "0.5,grey,0.5"], ["--mean", "grey"]),
    ],
    ids=lambda words: " ".join(words[1:] or words) if isinstance(words, list) else "",
)
def test_a_model_or_plan_that_cannot_be(
    command: str, words: list[str], named: list[str], out: Path, vitcompress: Vitcompress, no_network: None
) -> None:
    rest = ["--out", out, "--steps", 0] if command == "compress" else []
    mistake(vitcompress(command, *words, *rest), *named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--std", "0,0,0"], ["--std"]),
        (["--std", "nan,1,1"], ["--std"]),
        (["--std=-1,1,1"], ["--std"]),
        (["--mean", "inf,0,0"], ["--mean"]),
        (["--mean", "0.5,0.5"], ["--mean has 2 values; the model has 3 channels"]),
        (["--crop-pct", "0"], ["--crop-pct"]),
        (["--interpolation", "magic"], ["--interpolation magic"]),
        (["--lr", "0"], ["--lr"]),
        (["--lr", "inf"], ["--lr"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--device", "tpu"], ["--device tpu"]),
        (["--loss", "magic=1"], ["--loss magic", "logits, hidden"]),
        (["--loss", "logits=0"], ["--loss", "zero"]),
        (["--loss", "logits=[1"], ["--loss"]),
        (["--max-size", "big"], ["--max-size", "40MB"]),
        (["--max-size", "40"], ["--max-size: 40 is 40 bytes", "did you mean 40MB?"]),
        (["--max-drop", "nan"], ["--max-drop"]),
        (["--epochs", "inf", "--steps", None], ["--epochs"]),
        (["--epochs", "1", "--max-minutes", "1", "--steps", None], ["--steps, --epochs and --max-minutes"]),
    ],
    ids=lambda words: " ".join(map(str, words[:2])),
)
def test_an_option_that_cannot_be(
    words: list[str | None], named: list[str], out: Path, vitcompress: Vitcompress, teacher: list[str], images: Path
) -> None:
    length = FAST[2:] if None in words else FAST
    typed = [word for word in words if word not in (None, "--steps")]
    mistake(vitcompress("compress", *teacher, "--data", images, *length, *typed, "--out", out), *named)


def test_every_fault_that_can_be_seen_at_once_is_told_at_once(
    out: Path, vitcompress: Vitcompress, tmp_path: Path
) -> None:
    words = ["--share", 99, "--checkpoint", tmp_path / "gone.pth", "--data", tmp_path / "nothing", "--max-drop", 1]
    ended = vitcompress("compress", "deit_tiny", *words, "--out", out.parent / "no" / "x.safetensors")
    mistake(ended, "--share 99", "gone.pth", "nothing", "--out")


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["compress", "dry run"])
def test_a_gate_that_the_plan_misses_is_told_before_training(
    more: list[str], out: Path, vitcompress: Vitcompress, teacher: list[str], mini: Path, images: Path
) -> None:
    words = ["--data", images, "--share", 2, "--min-ratio", 20, "--max-size", "1KB", "--out", out]
    commands: list[list[object]] = [["compress", *teacher, *more], *([] if more else [["finetune", mini]])]
    for command in commands:
        asked = [word for word in words if command[0] == "compress" or word not in ("--share", 2)]
        ended = vitcompress(*command, *asked)
        mistake(ended, "--min-ratio 20: this plan only reaches 1.", "--max-size 1,000 bytes: this plan's tensors alone")


def test_what_is_not_there_is_told_without_reading_it(vitcompress: Vitcompress, tmp_path: Path, images: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    mistake(vitcompress("plan", "deit_tiny", "--checkpoint", gone), f"--checkpoint {gone} does not exist")
    words = ["--checkpoint", gone, "--data", tmp_path / "no", "--val-data", f"wds:{tmp_path}/none", "--class-map", gone]
    ended = vitcompress("compress", "deit_tiny", *words, "--dry-run")
    mistake(
        ended, f"--checkpoint {gone}", f"--data {tmp_path}/no does", f"--val-data wds:{tmp_path}/none", "--class-map"
    )
    ended = vitcompress("plan", "deit_tiny", "--calibrate", tmp_path / "no")
    mistake(ended, f"--calibrate {tmp_path}/no does not exist")
    assert "--data" not in ended.err


@pytest.mark.parametrize("name", ["b.pt", "b", "b.safetensor"])
def test_a_file_of_another_ending_is_refused(
    name: str, out: Path, vitcompress: Vitcompress, teacher: list[str], mini: Path, images: Path
) -> None:
    for command in (["compress", *teacher], ["finetune", mini]):
        ended = vitcompress(*command, "--data", images, *FAST, "--out", out.with_name(name))
        mistake(ended, f"{name}: the artifact is a .safetensors file", "Hint: Give --out", "b.safetensors")


@pytest.mark.parametrize(
    "kind", [["--adapter-rank", 2], ["--share", 1, "--basis", 2, "--no-matrices"], ["--share", 1, "--width", 0.5]]
)
def test_factors_and_narrow_blocks_want_images_that_can_be_read(
    kind: list[object], out: Path, tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], spoilt: Path
) -> None:
    words = ["compress", *teacher, *kind, "--steps", 0, "--num-workers", 0, "--out", out]
    (tmp_path / "empty").mkdir()
    mistake(vitcompress(*words, "--data", tmp_path / "empty"), tmp_path / "empty")
    mistake(vitcompress(*words, "--data", spoilt / "train"), spoilt / "train/cat/1.png", "--skip-bad-images")


def test_relations_of_narrow_heads_are_refused(
    out: Path, vitcompress: Vitcompress, teacher: list[str], images: Path
) -> None:
    words = ["--share", 1, "--width", 0.5, "--loss", "attention=1", "--data", images, "--out", out]
    mistake(vitcompress("compress", *teacher, *words), "--loss attention", "Drop this loss", "--width")


def test_a_gate_on_accuracy_without_labels_says_so_before_any_work(
    out: Path, vitcompress: Vitcompress, teacher: list[str], flat: Path
) -> None:
    words = ["--data", flat, "--max-drop", 1]
    mistake(vitcompress("compress", *teacher, *words, "--out", out), "--max-drop needs labeled images")


def test_a_run_that_blows_up_is_no_success(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], images: Path
) -> None:
    out = tmp_path / "mini.safetensors"
    out.write_bytes(OLD)
    words = ["--data", images, *FAST, "--lr", "1e30", "--out", out]
    ended = vitcompress("compress", *teacher, *words)
    mistake(ended, "not finite", "--lr 1e+30")
    assert out.read_bytes() == OLD


# --- checkpoints


class Runs:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain-pickle"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_not_run(
    protocol: str, wrapped: bool, out: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    marker, path = tmp_path / "it-ran", tmp_path / "w.pth"
    content: Any = {"model": dict(tiny().state_dict()), "args": Runs(marker)} if wrapped else Runs(marker)
    if protocol == "plain-pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "zip")
    words = [ARCHITECTURE, *model_flags(), "--checkpoint", path, "--steps", 0, "--out", out]
    ended = vitcompress("compress", *words)
    assert not marker.exists()
    mistake(ended, f"--checkpoint {path}", "was not run")
    assert "weights_only=False" not in ended.err


def test_a_pickle_in_a_local_folder_is_not_run(out: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    marker, folder = tmp_path / "it-ran", tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        f'{{"architecture": "{ARCHITECTURE}", "num_classes": 5, "pretrained_cfg": {{"num_classes": 5}}}}'
    )
    torch.save({"state_dict": Runs(marker)}, folder / "pytorch_model.bin")
    ended = vitcompress("compress", f"local-dir:{folder}", *model_flags(), "--steps", 0, "--out", out)
    assert not marker.exists()
    mistake(ended, folder)
    assert "weights_only=False" not in ended.err


def cut(path: Path, keep: Callable[[int], int]) -> None:
    path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "one-byte": lambda path: path.write_bytes(b"\x80"),
    "cut-by-half": lambda path: cut(path, lambda size: size // 2),
    "cut-by-one": lambda path: cut(path, lambda size: size - 1),
    "cut-in-header": lambda path: cut(path, lambda size: 60),
    "a-web-page": lambda path: path.write_bytes(b"<!DOCTYPE html><html>404</html>"),
    "git-lfs-pointer": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "a-folder": lambda path: path.rename(path.with_name("aside")).with_name(path.name).mkdir(),
}


@pytest.mark.broad
@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy.pth"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_checkpoint_is_named(broken: str, kind: str, tmp_path: Path, vitcompress: Vitcompress) -> None:
    path = tmp_path / f"w.{kind}"
    if kind == "safetensors":
        save_file(tiny().state_dict(), path)
    else:
        torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=kind == "pth")
    BROKEN[broken](path)
    before = listing(tmp_path)
    out = tmp_path / "mini.safetensors"
    words = [ARCHITECTURE, *model_flags(), "--checkpoint", path, "--steps", 0, "--out", out]
    mistake(vitcompress("compress", *words), f"--checkpoint {path}")
    assert listing(tmp_path) == before


@pytest.mark.broad
@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(3)],
        torch.zeros(3),
        {"lr": 0.1},
        {},
        {"model": {}},
        {"model": None},
        {"model": 3},
        {0: torch.zeros(1)},
    ],
    ids=["list", "tensor", "number", "empty", "empty-model", "none", "int", "int-key"],
)
def test_a_checkpoint_that_holds_no_state_dict_is_named(
    content: Any, out: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    torch.save(content, tmp_path / "w.pth")
    words = [ARCHITECTURE, *model_flags(), "--checkpoint", tmp_path / "w.pth", "--steps", 0, "--out", out]
    mistake(vitcompress("compress", *words), f"--checkpoint {tmp_path / 'w.pth'}")


def test_every_wrong_key_of_a_checkpoint_is_listed_at_once(out: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    weights = tiny().state_dict()
    weights["blocks.0.norm1.bias"] = torch.zeros(3)
    weights["head.weight"] = torch.zeros(9, 24)
    del weights["blocks.2.attn.qkv.weight"], weights["norm.bias"]
    weights |= {"extra.a": torch.zeros(1), "extra.b": torch.zeros(2)}
    save_file(weights, tmp_path / "w.safetensors")
    words = [ARCHITECTURE, *model_flags(), "--checkpoint", tmp_path / "w.safetensors", "--steps", 0, "--out", out]
    ended = vitcompress("compress", *words)
    mistake(
        ended,
        "shape: blocks.0.norm1.bias is (3,), the model has (24,)",
        "shape: head.weight is (9, 24), the model has (5, 24)",
        "missing: blocks.2.attn.qkv.weight (72, 24)",
        "missing: norm.bias (24,)",
        "unexpected: extra.a (1,)",
        "unexpected: extra.b (2,)",
        "--model-arg",
    )
    assert sum(line.startswith("  ") for line in ended.err.splitlines()) == 6


def test_a_checkpoint_of_another_width_is_told_in_a_few_lines(
    out: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    save_file(tiny(embed_dim=48, depth=6).state_dict(), tmp_path / "w.safetensors")
    words = [ARCHITECTURE, *model_flags(), "--checkpoint", tmp_path / "w.safetensors", "--steps", 0, "--out", out]
    ended = vitcompress("compress", *words)
    mistake(ended, "more)", "The weights are 48 wide, the model 24.")
    assert sum(line.startswith("  ") for line in ended.err.splitlines()) == 4


def test_a_checkpoint_of_another_depth_is_not_taken(out: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    save_file(tiny(depth=6).state_dict(), tmp_path / "w.safetensors")
    words = [ARCHITECTURE, *model_flags(), "--checkpoint", tmp_path / "w.safetensors", "--steps", 0, "--out", out]
    mistake(vitcompress("compress", *words), "unexpected: blocks.4.", "… (22 more)", "unexpected: blocks.5.")


@pytest.mark.parametrize("model", ["hf-hub:someone/tiny", "deit_tiny"])
def test_a_hub_model_without_a_network_hints_at_a_checkpoint(
    model: str, out: Path, no_network: None, vitcompress: Vitcompress
) -> None:
    start = time.monotonic()
    mistake(vitcompress("compress", model, "--steps", 0, "--out", out), model, "cannot reach", "--checkpoint")
    assert time.monotonic() - start < 30


# --- images


@pytest.fixture
def spoilt(images: Path, tmp_path: Path) -> Path:
    """`images`, one of its training and one of its validation images cut short."""
    root = tmp_path / "spoilt"
    shutil.copytree(images, root)
    for name in ("train/cat/1.png", "val/dog/0.png"):
        (root / name).write_bytes((root / name).read_bytes()[:300])
    return root


def test_an_unreadable_image_is_named(
    out: Path, images: Path, spoilt: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    words = ["compress", *teacher, "--data", spoilt, *FAST, "--batch-size", 15, "--out", out]
    mistake(vitcompress(*words), spoilt / "val/dog/0.png", "--skip-bad-images")  # the teacher sees it first
    mistake(vitcompress(*words, "--val-data", images / "val"), spoilt / "train/cat/1.png", "--skip-bad-images")
    words += ["--steps", 0]
    mistake(vitcompress(*words, "--start", "first"), spoilt / "val/dog/0.png", "--skip-bad-images")
    mistake(vitcompress(*words, "--val-data", spoilt / "train"), spoilt / "train/cat/1.png", "--skip-bad-images")


def test_an_unreadable_image_is_named_by_a_worker_too(
    out: Path, images: Path, spoilt: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    words = ["compress", *teacher, "--data", spoilt, *FAST, "--num-workers", 1, "--batch-size", 15, "--out", out]
    mistake(vitcompress(*words, "--val-data", images / "val"), spoilt / "train/cat/1.png", "--skip-bad-images")


def test_bad_images_are_counted_when_they_may_be_skipped(
    tmp_path: Path, spoilt: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    out = tmp_path / "mini.safetensors"
    words = ["--data", spoilt, *FAST, "--batch-size", 15, "--skip-bad-images", "--start", "calibrated", "--out", out]
    assert vitcompress("compress", *teacher, *words).code == 0
    report = read_manifest(out).report
    assert (report["train"]["skipped_images"], report["train"]["images"]) == (1, 15)
    assert (report["accuracy"]["num_skipped"], report["accuracy"]["num_images"]) == (1, 9)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "length",
    [["--steps", 0, "--start", "calibrated"], ["--steps", 2], ["--max-minutes", 0.02]],
    ids=["calibrated", "steps", "minutes"],
)
def test_not_one_readable_training_image_is_an_error_even_if_they_may_be_skipped(
    length: list[object], out: Path, tmp_path: Path, flat: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    for number in range(3):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / f"{number}.jpg").write_bytes(b"no image")
    words = ["--data", tmp_path / "bad", "--val-data", flat, "--skip-bad-images", *FAST[2:], *length, "--out", out]
    mistake(vitcompress("compress", *teacher, *words), tmp_path / "bad")


@pytest.mark.parametrize("flag", ["--data", "--val-data"])
def test_a_folder_that_holds_no_images_is_named(
    flag: str, out: Path, tmp_path: Path, images: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    empty, file, gone = tmp_path / "empty", tmp_path / "file.png", tmp_path / "gone"
    (empty / "cat").mkdir(parents=True)
    (empty / "cat" / "notes.txt").write_text("no image")
    draw_image(file, 0)
    for folder, message in ((empty, "has no images"), (file, "is not a folder"), (gone, "does not exist")):
        words = [flag, folder] if flag == "--data" else ["--data", images / "train", flag, folder]
        mistake(vitcompress("compress", *teacher, *words, *FAST, "--out", out), f"{flag} {folder} {message}")


def test_class_folders_that_match_no_mapping_are_named(
    out: Path, tmp_path: Path, made: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    for name in ("one", "two"):
        draw_image(tmp_path / "two" / name / "0.png", 0)
    named = (f"{tmp_path / 'two'} has 2 classes (one, two), but the model has 5 classes", "--class-map")
    mistake(vitcompress("compress", *teacher, "--data", tmp_path / "two", *FAST, "--out", out), *named)
    mistake(vitcompress("evaluate", made / "mini.safetensors", "--data", tmp_path / "two"), *named)


def test_a_class_map_that_is_no_text_is_named(
    out: Path, tmp_path: Path, images: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    (tmp_path / "map.txt").write_bytes(b"\xff\xfe\x00")
    words = ["--data", images, "--class-map", tmp_path / "map.txt"]
    mistake(vitcompress("compress", *teacher, *words, *FAST, "--out", out), f"--class-map {tmp_path / 'map.txt'}")


# --- where to write


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A folder in which not even root can make a file."""
    folder = Path("/proc/self")
    if not folder.is_dir():
        pytest.skip("no folder is known that root cannot write to")
    return folder


def test_an_output_folder_that_is_not_there_is_named_before_any_work(
    tmp_path: Path, vitcompress: Vitcompress, weights: Path
) -> None:
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "folder.safetensors").mkdir()
    before = listing(tmp_path)
    for out in (
        tmp_path / "no/such/mini.safetensors",
        tmp_path / "file" / "x.safetensors",
        tmp_path / "folder.safetensors",
    ):
        ended = vitcompress("compress", ARCHITECTURE, "--checkpoint", weights, "--steps", 0, "--out", out)
        mistake(ended, f"--out {out}")
        assert "does not fit the model" not in ended.err
    assert listing(tmp_path) == before
    assert not (tmp_path / "no").exists()


def test_a_read_only_output_folder_is_named_before_any_work(
    out: Path, vitcompress: Vitcompress, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # tests may run as root, whom no mode keeps out
    ended = vitcompress("compress", ARCHITECTURE, "--checkpoint", weights, "--steps", 0, "--out", out)
    mistake(ended, f"--out {out}", "cannot be written to")
    assert "does not fit the model" not in ended.err


def test_a_folder_that_not_even_root_can_write_to_is_named(
    unwritable: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    mistake(
        vitcompress("compress", *teacher, "--steps", 0, "--quiet", "--out", unwritable / "x.safetensors"), unwritable
    )


def test_an_output_over_its_own_checkpoint_is_refused(tmp_path: Path, vitcompress: Vitcompress, weights: Path) -> None:
    mine = Path(shutil.copy(weights, tmp_path / "mine.safetensors"))
    before = listing(tmp_path)
    words = [ARCHITECTURE, *model_flags(), "--checkpoint", mine, "--steps", 0, "--out", mine]
    mistake(vitcompress("compress", *words), "--out", "--checkpoint")
    assert listing(tmp_path) == before


# --- artifacts


@pytest.mark.parametrize("command", ["report", "evaluate", "check"])
@pytest.mark.parametrize("harm", HARM)
def test_a_harmed_artifact_is_refused_by_every_command(
    harm: str, command: str, mini: Path, images: Path, vitcompress: Vitcompress
) -> None:
    mini.write_bytes(HARM[harm](mini.read_bytes()))
    before = listing(mini.parent)
    more = {"report": [], "evaluate": ["--data", images, "--num-workers", 0], "check": ["--min-ratio", 1]}[command]
    mistake(vitcompress(command, mini, *more), mini)
    assert listing(mini.parent) == before


@pytest.mark.parametrize("command", ["report", "evaluate", "check"])
def test_something_that_is_no_artifact_is_named(
    command: str, tmp_path: Path, weights: Path, images: Path, vitcompress: Vitcompress
) -> None:
    more = {"report": [], "evaluate": ["--data", images], "check": ["--min-ratio", 1]}[command]
    for path, message in (
        (tmp_path / "gone.safetensors", "does not exist"),
        (tmp_path, "is a folder without model.safetensors"),
        (weights, "not one that vitcompress wrote"),
    ):
        mistake(vitcompress(command, path, *more), path, message)


@pytest.mark.parametrize("version", ["artifact.manifest.FORMAT_VERSION", "pipeline.finish.SCHEMA_VERSION"])
def test_an_artifact_of_the_future_asks_for_an_upgrade(
    version: str, tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mini.safetensors"
    words = [*teacher, "--start", "first", "--steps", 0, "--quiet"]
    with monkeypatch.context() as future:
        future.setattr(f"vitcompress.{version}", 3)
        assert vitcompress("compress", *words, "--out", path).code == 0
    for command in (["report"], ["check", "--min-ratio", 1]):
        mistake(vitcompress(*command, path), "3; this vitcompress reads", "upgrade")


def test_a_check_without_a_gate_says_so(mini: Path, vitcompress: Vitcompress) -> None:
    mistake(vitcompress("check", mini), "no gate", "--max-drop")


def test_an_evaluation_without_images_says_so(mini: Path, vitcompress: Vitcompress) -> None:
    mistake(vitcompress("evaluate", mini), "no images", "--data DIR")


def test_a_teacher_that_was_named_must_fit(made: Path, tmp_path: Path, images: Path, vitcompress: Vitcompress) -> None:
    other = {name: t + 1 for name, t in tiny().state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    words = ["evaluate", made / "mini.safetensors", "--data", images, "--num-workers", 0]
    mistake(vitcompress(*words, "--checkpoint", tmp_path / "other.safetensors"), "that mini.safetensors was made from")
    mistake(vitcompress(*words, "--teacher", "resnet999"), "resnet999 is unknown")


# --- recipes


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"plan: {shear: 2}", ["plan.shear", "did you mean share?"]),
        (b"plain: {share: 2}", ["plain", "did you mean plan?"]),
        (b"plan: {share: two}", ["--share two"]),
        (b"plan: {share: 0}\ndata: {batch_size: -1}", ["--share 0", "--batch-size -1"]),
        (b"plan: 3", ["stages"]),
        (b"- plan", ["stages"]),
        (b"", ["stages"]),
        (b"plan: {share: 2", ["is not YAML"]),
        (b"\xff\xfe\x00", ["is not YAML"]),
        (b"plan: !!python/object/apply:os.mkdir [it-ran]", ["is not YAML"]),
        (b"1: {share: 2}", ["1"]),
        (b"plan: {1: 2}", ["1"]),
        (b"distill: {steps: 1, epochs: 2}", ["--steps, --epochs"]),
    ],
    ids=lambda value: value.decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_a_recipe_that_cannot_be_followed_is_named(
    text: bytes,
    named: list[str],
    out: Path,
    tmp_path: Path,
    vitcompress: Vitcompress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(text)
    mistake(vitcompress("compress", "deit_tiny", "--recipe", recipe, "--out", out), *named)
    assert not (tmp_path / "it-ran").exists()


def test_a_recipe_that_is_not_there_is_named(out: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    words = ["--recipe", tmp_path / "gone.yaml", "--out", out]
    mistake(vitcompress("compress", "deit_tiny", *words), f"--recipe {tmp_path / 'gone.yaml'}")


def test_no_model_at_all_says_so(out: Path, vitcompress: Vitcompress) -> None:
    mistake(vitcompress("compress", "--out", out), "No model is named", "Give a MODEL")


def test_the_tiny_model_is_what_these_tests_think(teacher: list[str], vitcompress: Vitcompress, out: Path) -> None:
    assert ARGS["depth"] == 4
    mistake(vitcompress("compress", *teacher, "--share", 5, "--steps", 0, "--out", out), "--share 5", "4 blocks")


# --- targets


@pytest.mark.broad
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--target-ratio", "1"], ["--target-ratio 1"]),
        (["--target-size", "big"], ["--target-size", "40MB"]),
        (["--target-drop", "0"], ["--target-drop 0"]),
        (["--target-ratio", "2", "--kinds", "magic"], ["--kinds", "narrow"]),
        (
            ["--target-ratio", "2", "--target-drop", "1"],
            ["--target-ratio and --target-drop cannot be used together. Give only one of them"],
        ),
        (
            ["--target-ratio", "2", "--share", "2"],
            ["--share and --target-ratio cannot be used together", "Remove --share: with --target-ratio"],
        ),
        (["--target-size", "9MB", "--width", "0.5"], ["--width and --target-size cannot be used together"]),
        (["--target-drop", "1", "--adapter-rank", "2"], ["--adapter-rank and --target-drop cannot be used together"]),
        (["--target-ratio", "2", "--pattern", "cycle"], ["--pattern and --target-ratio cannot be used together"]),
        (
            ["--target-ratio", "2", "--basis", "2", "--no-matrices"],
            ["--no-matrices and --target-ratio cannot be used together"],
        ),
        (["--target-ratio", "2", "--transforms", "rpe"], ["--transforms rpe", "--kinds low_rank,skip,share"]),
        (["--target-ratio", "2", "--model-arg", "num_classes=0"], ["--target-ratio needs a model with classes"]),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_a_target_that_cannot_be(
    command: str, words: list[str], named: list[str], out: Path, vitcompress: Vitcompress, flat: Path
) -> None:
    rest = ["--out", out, "--steps", 0, "--data", flat] if command == "compress" else ["--calibrate", flat]
    mistake(vitcompress(command, "vit_tiny", *words, *rest), *named)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kinds", "narrow"], "--kinds needs a target"),
        (["--width-multiple", 1], "--width-multiple needs a target"),
        (["--max-memory", "8GB"], "--max-memory needs a target"),
        (["--target-ratio", 2, "--start", "first"], "--start first and --target-ratio cannot be used together"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(
    words: list[object], message: str, out: Path, vitcompress: Vitcompress, teacher: list[str], flat: Path
) -> None:
    mistake(vitcompress("compress", *teacher, *words, "--data", flat, *FAST, "--out", out), message, "--target-ratio")


def test_a_target_with_a_folder_of_no_images_names_it(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    mistake(vitcompress("plan", *teacher, "--calibrate", tmp_path / "empty"), tmp_path / "empty")


def test_options_of_a_model_without_classes_are_not_measured(
    flat: Path, vitcompress: Vitcompress, no_network: None
) -> None:
    words = ["--model-arg", "num_classes=0", "--calibrate", flat]
    mistake(vitcompress("plan", "vit_tiny", *words), "needs a model with classes", "Hint:")


@pytest.mark.broad
@pytest.mark.parametrize(
    ("target", "named"),
    [
        (["--target-ratio", 900], ["--target-ratio 900 is out of reach", "Use at most --target-ratio"]),
        (["--target-size", "4kB"], ["--target-size 4,000 bytes is out of reach", "Use at least --target-size"]),
        (["--target-size", "3kB"], ["--target-size 3,000 bytes is out of reach", "Use more than --target-size 4kB"]),
    ],
)
def test_a_target_out_of_reach_names_one_that_is_not(
    target: list[object], named: list[str], out: Path, vitcompress: Vitcompress, teacher: list[str], flat: Path
) -> None:
    words = ["--data", flat, *FAST, "--kinds", "share", "--calibration-images", 4, "--quiet", "--out", out]
    mistake(vitcompress("compress", *teacher, *target, *words), *named)
