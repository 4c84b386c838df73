"""Other heads and image sizes: sharing is kept, old classes stay, and mistakes come first."""

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

import vitcompress as package
from tests.benchmarks import transfer
from tests.conftest import Vitcompress, draw_image, listing
from tests.factories import ROWS
from vitcompress.artifact.manifest import Manifest, to_tree
from vitcompress.artifact.read import read_manifest
from vitcompress.artifact.write import write
from vitcompress.errors import RecipeError
from vitcompress.pipeline.adapt import adapt_student, adapted_source
from vitcompress.plans.make import make_plan, with_sizes_on
from vitcompress.plans.model import Plan
from vitcompress.pretrained.build import build_model, empty_model
from vitcompress.pretrained.resolve import Source
from vitcompress.quantize.store import donor_tensors, fill
from vitcompress.recipe import PlanRecipe
from vitcompress.recipe.compose import build
from vitcompress.report.model import Parent, Report, from_json
from vitcompress.runtime.console import JsonLog, Reporter
from vitcompress.surgery import apply_plan

FAST = ("--batch-size", 6, "--num-workers", 0, "--device", "cpu", "--quiet")
BIGGER = {
    "vit": 64, "vit dynamic": 64, "deit distilled": 64, "dinov2 registers": 64, "headless": 64, "swin": 64,
    "swin v2": 64, "beit": 64, "beit shared bias": 64, "eva02": 64,
}  # fmt: skip


def shared_ids(model: nn.Module, plan: Plan) -> bool:
    return all(
        model.get_parameter(f"{block}.{name}") is model.get_parameter(f"{group.donor}.{name}")
        for group in plan.groups
        for block in group.blocks
        for name in group.shared
    )


def student_of(row: str, **recipe: Any) -> tuple[Source, nn.Module, Plan]:
    source = Source(row, ROWS[row].architecture, dict(ROWS[row].args))
    torch.manual_seed(0)
    model = build_model(source).eval()
    plan = make_plan(model, PlanRecipe(transforms=ROWS[row].transforms, **recipe), name=row)  # type: ignore[arg-type]
    apply_plan(model, plan)
    return source, model, plan


# --- the model: an identity, an equality of counts, a value in closed form


@pytest.mark.parametrize("row", ["vit", "swin", "beit", "eva02", "deit distilled"])
def test_the_same_head_and_size_change_nothing(row: str) -> None:
    source, student, plan = student_of(row, share=2)
    x = torch.randn(2, 3, 32, 32)
    before = student(x)
    adapt_student(student, plan, num_classes=None, img_size=32)
    assert torch.equal(student(x), before)
    assert shared_ids(student, plan)
    assert adapted_source(source, num_classes=None, img_size=None) == source
    assert adapted_source(source, num_classes=None, img_size=32) == source


@pytest.mark.parametrize("row", BIGGER)
def test_another_size_and_head_are_those_that_the_file_will_be_built_with(row: str) -> None:
    """Sharing of tables is where timm's resize would untie blocks."""
    source, student, plan = student_of(row, share=2, share_tables=True, share_biases=True)
    adapt_student(student, plan, num_classes=3, img_size=BIGGER[row])
    assert shared_ids(student, plan)
    target = adapted_source(source, num_classes=3, img_size=BIGGER[row])
    rebuilt = empty_model(Source(**json.loads(json.dumps(vars(target)))))  # as a header gives it back
    measured = with_sizes_on(plan, rebuilt)
    apply_plan(rebuilt, plan)
    shapes = {name: tuple(t.shape) for name, t in donor_tensors(rebuilt).items()}
    assert {name: tuple(t.shape) for name, t in donor_tensors(student).items()} == shapes
    assert sum(p.numel() for p in student.parameters()) == measured.size.student_params
    x = torch.randn(2, 3, BIGGER[row], BIGGER[row])
    fill(rebuilt, donor_tensors(student))
    assert torch.equal(rebuilt.eval()(x), student(x))
    assert student(x).shape == (2, 3)


def test_positions_are_resampled_as_timm_does_and_the_rest_is_kept() -> None:
    _, student, plan = student_of("vit", share=2)
    old = {name: p.detach().clone() for name, p in student.named_parameters()}
    adapt_student(student, plan, num_classes=None, img_size=64)
    for name, p in student.named_parameters():
        expected = resample_abs_pos_embed(old[name], [8, 8], [4, 4]) if name == "pos_embed" else old[name]
        assert torch.equal(p, expected), name


def test_tables_are_resampled_between_the_same_ends() -> None:
    """The bias of a patch to itself and to the far corners of its window is what it was."""
    _, student, plan = student_of("swin", share=2, share_tables=True)
    name = "layers.0.blocks.1.attn.relative_position_bias_table"
    old = nn.init.normal_(student.get_parameter(name)).detach().clone()
    adapt_student(student, plan, num_classes=None, img_size=64)
    new = student.get_parameter(name)
    assert (tuple(old.shape), tuple(new.shape)) == ((7 * 7, 2), (15 * 15, 2))
    assert new is student.get_parameter("layers.0.blocks.0.attn.relative_position_bias_table")
    for place in (0, 0.5, 1):
        torch.testing.assert_close(
            new[round(place * (15 * 15 - 1))], old[round(place * (7 * 7 - 1))], rtol=0, atol=1e-3
        )


@pytest.mark.parametrize(
    ("row", "img_size", "message", "hint"),
    [
        ("vit", 60, "--img-size 60: not a multiple of the patch size 8.", "Use 56 or 64."),
        ("vit", 5, "--img-size 5: not a multiple of the patch size 8.", "Use 8 or 16."),
        ("swin", 36, "--img-size 36: windows of 4×4 do not tile the 18×18 patches of stage 0.", "Use 32 or 40."),
    ],
)
def test_a_size_that_cannot_be(row: str, img_size: int, message: str, hint: str) -> None:
    source = Source(row, ROWS[row].architecture, dict(ROWS[row].args))
    with pytest.raises(RecipeError) as caught:
        adapted_source(source, num_classes=None, img_size=img_size)
    assert (str(caught.value), caught.value.hint) == (message, hint)


# --- the command


def finetune(vitcompress: Vitcompress, mini: Path, out: Path, *words: object) -> tuple[Report, nn.Module]:
    ended = vitcompress("finetune", mini, "--out", out, *FAST, *words)
    assert ended.code == 0, ended.err
    return from_json(json.loads(vitcompress("report", out, "--json").out)), package.load(out)


def test_another_label_set_and_size(
    mini: Path, regrouped: Path, tmp_path: Path, vitcompress: Vitcompress, no_network: None
) -> None:
    before = mini.read_bytes()
    out = tmp_path / "new.safetensors"
    report, model = finetune(vitcompress, mini, out, "--data", regrouped, "--img-size", 64, "--steps", 3)
    assert mini.read_bytes() == before
    manifest, parent = read_manifest(out), read_manifest(mini)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert shared_ids(model, manifest.plan)
    assert model.pretrained_cfg["label_names"] == ("blue", "green", "red")  # type: ignore[index]
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)  # type: ignore[index]
    assert report.train.losses == {"labels": 1.0}
    assert (report.train.teacher, report.before) == (None, None)
    assert report.accuracy is not None
    assert (report.accuracy.student_top1 is None, report.accuracy.teacher_top1) == (False, None)
    expected = Parent(mini.name, hashlib.sha256(before).hexdigest(), str(parent.report["command"]))
    assert report.lineage == (expected,)
    assert report.size.student_params == sum(p.numel() for p in model.parameters())
    assert "The head is new, for 3 classes" in vitcompress("report", out).out.replace("\n", " ")
    assert manifest.source_sha256 == ""

    ended = vitcompress("evaluate", out, "--data", regrouped, "--num-workers", 0, "--json")
    assert json.loads(ended.out)["student_top1"] == report.accuracy.student_top1
    assert "fine-tuned" in ended.err
    shutil.rmtree(tmp_path / "some", ignore_errors=True)
    shutil.copytree(regrouped / "val" / "red", tmp_path / "some" / "red")  # one class is known by its name
    assert vitcompress("evaluate", out, "--data", tmp_path / "some", "--num-workers", 0).code == 0
    assert vitcompress("check", out, "--min-ratio", 1.1).code == 0
    assert vitcompress("check", out, "--max-drop", 1).code == 3

    again, _ = finetune(vitcompress, out, tmp_path / "again.safetensors", "--data", regrouped, "--steps", 2)
    assert [parent.name for parent in again.lineage] == ["mini.safetensors", "new.safetensors"]
    assert again.before is not None
    assert again.before.student_top1 == report.accuracy.student_top1  # the same weights on the same images


def test_the_head_is_kept_where_the_classes_are_the_same(
    mini: Path, images: Path, weights: Path, tmp_path: Path, vitcompress: Vitcompress, no_network: None
) -> None:
    out = tmp_path / "out.safetensors"
    report, model = finetune(vitcompress, mini, out, "--data", images, "--steps", 0)
    parent = package.load(mini)
    for name, p in model.named_parameters():
        assert torch.equal(p, parent.get_parameter(name)), name
    assert report.before is not None
    assert report.before == report.accuracy
    manifest = read_manifest(out)
    assert manifest.classes == ("ape", "bee", "cat", "dog", "eel")
    assert manifest.source_sha256 == read_manifest(mini).source_sha256
    assert vitcompress("evaluate", out, "--data", images, "--checkpoint", weights, "--num-workers", 0).code == 0


def test_a_named_teacher_teaches_without_labels(
    mini: Path, flat: Path, teacher: list[str], weights: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    name, *args = teacher
    pairs = [word for flag, value in zip(args[::2], args[1::2], strict=True) if flag == "--model-arg"
             for word in ("--teacher-arg", value)]  # fmt: skip
    words = ["--data", flat, "--teacher", name, *pairs, "--teacher-checkpoint", weights, "--steps", 2]
    report, _ = finetune(vitcompress, mini, tmp_path / "out.safetensors", *words)
    assert (report.train.teacher, report.train.losses) == (name, {"logits": 1.0})
    assert report.accuracy is not None
    assert report.accuracy.agreement is not None
    assert "Distilled" in vitcompress("report", tmp_path / "out.safetensors").out


@pytest.mark.thorough
def test_the_source_teaches_its_own_classes_by_default_whatever_the_size(
    tmp_path: Path, vitcompress: Vitcompress
) -> None:
    data = tmp_path / "data"
    for number in range(12):
        draw_image(data / f"{number}.png", number)
    mini, out = tmp_path / "mini.safetensors", tmp_path / "out.safetensors"
    words = ["--data", data, "--share", 12, "--steps", 0, "--quiet", "--mean", "0.5", "--out", mini]
    assert vitcompress("compress", "fashion_vit", *words).code == 0
    report, model = finetune(vitcompress, mini, out, "--data", data, "--img-size", 42, "--steps", 2)
    assert (report.train.teacher, report.train.losses) == ("fashion_vit", {"logits": 1.0})
    assert "fashion_vit sees the student's views, resized to 28×28." in report.notes
    assert report.accuracy is not None
    assert report.accuracy.agreement is not None
    assert model(torch.randn(1, 1, 42, 42)).shape == (1, 10)
    assert model.pretrained_cfg["mean"] == (0.5,)  # type: ignore[index]


def test_a_default_teacher_that_cannot_be_had_leaves_the_labels(
    mini: Path, images: Path, tmp_path: Path, vitcompress: Vitcompress, no_network: None
) -> None:
    report, _ = finetune(vitcompress, mini, tmp_path / "out.safetensors", "--data", images, "--steps", 1)
    assert (report.train.teacher, report.train.losses) == (None, {"labels": 1.0})
    assert any(note.startswith("Training continues without the teacher vit_tiny") for note in report.notes)


def test_an_older_file_without_lineage_still_loads(mini: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = to_tree

    def older(manifest: Manifest) -> Mapping[str, Any]:
        return {name: value for name, value in written(manifest).items() if name not in ("classes", "lineage")}

    manifest, student = read_manifest(mini), package.load(mini)
    monkeypatch.setattr("vitcompress.artifact.write.to_tree", older)
    write(tmp_path / "old.safetensors", student, manifest, torch.randn(1, 3, 32, 32))
    found = read_manifest(tmp_path / "old.safetensors")
    assert (found.classes, found.lineage) == ((), ())


# --- mistakes


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data", "{flat}", "--loss", "labels=1"], ["--loss labels needs labeled images"]),
        (["--data", "{regrouped}", "--loss", "logits=1"], ["--loss logits needs a teacher of the same classes"]),
        (["--data", "{regrouped}", "--loss", "features=1"], ["--loss features: ", "are logits of classes"]),
        (["--data", "{regrouped}", "--img-size", "60"], ["--img-size 60", "Use 56 or 64"]),
        (["--data", "{regrouped}", "--steps", "0"], ["--steps 0", "random"]),
        (["--data", "{regrouped}", "--teacher", "vit_tiny"], ["gives 1000 outputs, mini.safetensors 3"]),
        (["--data", "{regrouped}", "--teacher", "vit_tiny", "--teacher-arg", "in_chans=1"], ["1 channels", "3"]),
        (["--data", "{regrouped}", "--teacher", "vit_tiny", "--teacher-arg", "num_classes=0"], ["gives features"]),
        (["--data", "{flat}", "--label-smoothing", "0.1", "--loss", "logits=1"], ["there is no labels loss to smooth"]),
        (["--data", "{regrouped}", "--max-drop", "1"], ["--max-drop needs"]),
        (["--data", "{regrouped}/train/red"], ["nothing to learn from", "no labels"]),
        (["--data", "{regrouped}/nowhere", "--img-size", "60"], ["does not exist", "--img-size 60"]),
        ([], ["no images to learn from", "--data DIR"]),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_mistakes_come_before_any_weight(
    words: list[str], named: list[str], flat: Path, regrouped: Path, mini: Path, tmp_path: Path,
    vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch, no_network: None,
) -> None:  # fmt: skip
    monkeypatch.setattr("vitcompress.pipeline.origin.load", lambda path: pytest.fail("weights were loaded"))
    if "{regrouped}/train/red" in words:  # a flat folder, and a parent whose teacher is no place to look for
        monkeypatch.setattr("vitcompress.pipeline.origin.Origin.teacher", lambda origin: None)
    before = listing(tmp_path)
    typed = [word.format(flat=flat, regrouped=regrouped) for word in words]
    ended = vitcompress("finetune", mini, "--out", tmp_path / "out.safetensors", *FAST, *typed)
    assert (ended.code, ended.out, ended.err.count("Error:")) == (2, "", 1), ended
    for text in named:
        assert text in ended.err
    assert listing(tmp_path) == before


def test_files_that_cannot_be(
    mini: Path, regrouped: Path, weights: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    out = tmp_path / "out.safetensors"
    for file, message in (
        (weights, "not one that vitcompress wrote"),
        (tmp_path / "gone.safetensors", "does not exist"),
        (regrouped, "local-dir:"),
    ):
        ended = vitcompress("finetune", file, "--out", out, "--data", regrouped, *FAST)
        assert ended.code == 2
        assert message in ended.err
    ended = vitcompress("finetune", mini, "--out", mini, "--data", regrouped, *FAST)
    assert ended.code == 2
    assert f"--out {mini} would overwrite {mini}." in ended.err


def test_a_recipe_that_would_change_what_the_file_has_settled(
    mini: Path, regrouped: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("plan: {share: 3}\nstart: {start: mean}\ndistill: {steps: 1}\n")
    words = ["--recipe", recipe, "--out", tmp_path / "out.safetensors", "--data", regrouped]
    ended = vitcompress("finetune", mini, *words, *FAST)
    assert ended.code == 2
    assert "--share, --start" in ended.err
    recipe.write_text("distill: {steps: 1}\n")
    assert vitcompress("finetune", mini, *words, *FAST).code == 0


def test_a_teacher_of_other_class_names(mini: Path, regrouped: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    """As many classes are not the same classes."""
    shutil.copytree(regrouped, tmp_path / "other")
    for split in ("train", "val"):
        (tmp_path / "other" / split / "red").rename(tmp_path / "other" / split / "amber")
    finetune(vitcompress, mini, tmp_path / "teacher.safetensors", "--data", regrouped, "--steps", 1)
    words = ["--data", tmp_path / "other", "--teacher", tmp_path / "teacher.safetensors", "--steps", 1]
    ended = vitcompress("finetune", mini, "--out", tmp_path / "out.safetensors", *FAST, *words)
    assert ended.code == 2
    assert "has other classes than mini.safetensors" in ended.err


# --- what it is for


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_compressed_model_learns_other_classes_better_than_random_weights(tmp_path: Path) -> None:
    """Each side has the best of two learning rates, at equal steps."""
    transfer.write_images(tmp_path / "data", per_class=100)
    transfer.compress(tmp_path / "mini.safetensors", steps=100)
    transfer.randomize(tmp_path / "mini.safetensors", tmp_path / "random.safetensors")
    best = {
        name: max(transfer.finetune(tmp_path / name, tmp_path / "data", steps=30, lr=lr) for lr in (5e-4, 2e-3))
        for name in ("mini.safetensors", "random.safetensors")
    }
    assert best["mini.safetensors"] > best["random.safetensors"] + 3, best


def class_folders(root: Path, names: dict[str, int]) -> Path:
    for name, count in names.items():
        for number in range(count):
            draw_image(root / name / f"{number}.png", number)
    return root


def test_the_head_is_kept_for_numbers_and_for_some_of_its_classes(
    mini: Path, tmp_path: Path, vitcompress: Vitcompress, no_network: None
) -> None:
    words = ["--num-workers", 0, "--device", "cpu", "--steps", 0]
    for number, names in enumerate(("01234", "13", ("bee", "dog"))):
        data, out = class_folders(tmp_path / f"{number}", dict.fromkeys(names, 3)), tmp_path / f"{number}.safetensors"
        ended = vitcompress("finetune", mini, "--out", out, "--data", data, *words)
        assert ended.code == 0, ended.err
        assert "so its head is kept" in ended.err
        found = read_manifest(out)
        assert found.classes == ("ape", "bee", "cat", "dog", "eel")
        assert found.source_sha256 == read_manifest(mini).source_sha256


def test_a_new_head_is_told_of_before_training(mini: Path, regrouped: Path, tmp_path: Path, no_network: None) -> None:
    log = io.StringIO()
    reporter = Reporter(quiet=True, log=JsonLog(log))
    recipe = build({"model": "mini", "data": str(regrouped), "steps": 1, "batch_size": 6, "num_workers": 0})
    package.finetune(mini, recipe, tmp_path / "new.safetensors", reporter=reporter)
    said = [json.loads(line)["text"] for line in log.getvalue().splitlines()[:2]]
    assert said == ["classes: 3 folders in natural order, as timm numbers them", "new head for 3 classes"]
