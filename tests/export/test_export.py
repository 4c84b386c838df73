"""Exports hold each tensor once and compute the same; if they do not, nothing is left of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import vitcompress
from tests.conftest import Vitcompress, listing
from tests.factories import KINDS, ROWS, Row, build, planned, randomise, row_images, student_of
from vitcompress import export
from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.read import read_manifest
from vitcompress.artifact.write import write as write_artifact
from vitcompress.errors import ExportError, VitcompressError
from vitcompress.export import hf
from vitcompress.export.format import Written
from vitcompress.export.hf_card import model_card
from vitcompress.export.loaded import LoadedArtifact
from vitcompress.export.parity import Probe, compare_outputs
from vitcompress.pretrained.data_config import data_config
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.recipe import ModelRecipe
from vitcompress.runtime.extras import missing_packages

DATA = Path(__file__).parents[3] / "shared" / "data"
with_onnx = pytest.mark.skipif(bool(missing_packages("onnx")), reason="the extra onnx is not installed")
with_executorch = pytest.mark.skipif(
    bool(missing_packages("executorch")), reason="the extra executorch is not installed"
)
with_each_family = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def write(path: Path, row: Row, store: str = "source", **recipe: Any) -> Path:
    """Write an artifact of a model whose parameters are all random."""
    teacher = build(row)
    plan = planned(teacher, **recipe)
    student = student_of(teacher, plan).eval()
    randomise(student)
    stored = stored_tensors(student, store)
    round_to(student, stored, store)
    source = {"name": row.architecture, "architecture": row.architecture, "model_args": dict(row.args)}
    manifest = Manifest(
        source={**source, "pretrained_cfg": {}}, source_sha256=sha256_of(teacher.state_dict()), plan=plan,
        data_config=data_config(teacher, ModelRecipe(row.architecture)), recipe={}, report={}, versions={}, store=store,
    )  # fmt: skip
    probe = torch.randn(2, *manifest.data_config["input_size"])
    write_artifact(path, student, manifest, probe, stored=stored)
    return path


def exported(path: Path, to: str, name: str) -> export.Exported:
    return export.export(path, to, path.with_name(name), num_images=3)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def initializers(path: Path) -> dict[str, Any]:
    """The initializers of an ONNX file, as onnx itself reads them."""
    import onnx

    return {t.name: t for t in onnx.load(path).graph.initializer}


ONNX_CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "transformed": ("vit", "source", {"share": 2, "transforms": ("heads", "mlp", "rpe")}),
    "windows in int8": ("swin", "int8", {"share": 2, "transforms": ("heads", "mlp")}),
    "factors in int4": ("eva02", "int4", {"share": 2, "adapter_rank": 9, "transforms": ()}),
    "narrow in float16": ("vit", "fp16", {"share": 2, "width": 0.5, "transforms": ()}),
}


@pytest.mark.thorough
@with_onnx
@pytest.mark.parametrize(("name", "store", "recipe"), ONNX_CASES.values(), ids=ONNX_CASES.keys())
def test_onnx_holds_each_stored_tensor_once_and_computes_the_same(
    name: str, store: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "m.safetensors", ROWS[name], store, **recipe)
    done = exported(path, "onnx", "m.onnx")
    held, stored = initializers(tmp_path / "m.onnx"), load_file(path)
    matrices = {name for name, t in stored.items() if t.ndim > 1}
    assert matrices <= held.keys()
    others = sum(len(t.raw_data) for name, t in held.items() if name not in stored)
    assert others < 8_000  # masks, positions, shapes
    kinds = {"source": "FLOAT", "int8": "INT8", "int4": "INT4", "fp16": "FLOAT16"}
    import onnx

    coded = {name for name in matrices if f"{name}.scale" in stored} or matrices - {"cls_token", "pos_embed"}
    assert {onnx.TensorProto.DataType.Name(held[name].data_type) for name in coded} == {kinds[store]}
    model, row = vitcompress.load(path), ROWS[name]
    for count in (1, 3):
        seen = torch.randn(count, 3, *row.image, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = model(seen)
        torch.testing.assert_close(run_onnx(tmp_path / "m.onnx", seen), expected, rtol=1e-4, atol=1e-5)
    assert done.same_top1 == done.num_images == 3 + 4
    assert done.max_difference < 1e-5 * max(1.0, done.largest_output)
    assert done.tensor_bytes < 1.05 * sum(t.numel() * t.element_size() for t in stored.values()) + 10_000


@with_onnx
@pytest.mark.slow
@pytest.mark.parametrize("store", ["source", "int8"])
@with_each_family
def test_any_family_becomes_onnx(row: Row, store: str, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"share": 2, "transforms": row.transforms}
    done = exported(write(tmp_path / "m.safetensors", row, store, **recipe), "onnx", "m.onnx")
    assert done.max_difference < 1e-4 * done.largest_output


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vit", "swin v2", "beit", "eva"])
def test_any_kind_becomes_a_program(name: str, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", ROWS[name], "int8", transforms=(), **KINDS[kind])
    assert exported(path, "pt2", "m.pt2").max_difference == 0


@with_onnx
def test_int8_codes_and_scales_are_the_artifacts_own(tmp_path: Path) -> None:
    import onnx.numpy_helper

    path = write(tmp_path / "m.safetensors", ROWS["vit"], "int8", share=4, transforms=())
    exported(path, "onnx", "m.onnx")
    held, stored = initializers(tmp_path / "m.onnx"), load_file(path)
    coded = [name for name in stored if f"{name}.scale" in stored]
    assert len(coded) > 4
    for name in (*coded, *(f"{name}.scale" for name in coded)):
        assert np.array_equal(onnx.numpy_helper.to_array(held[name]), stored[name].numpy()), name
    graph = onnx.load(tmp_path / "m.onnx").graph
    decoded = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert sorted(decoded) == sorted(coded)  # each once, however many blocks use it


@pytest.mark.thorough
@with_onnx
def test_transformations_that_nothing_trained_yet_are_one_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "randomise", lambda student: None)
    path = write(tmp_path / "m.safetensors", ROWS["vit"], share=2, transforms=("heads", "mlp"))
    exported(path, "onnx", "m.onnx")
    mixes = [name for name in load_file(path) if "mix_" in name]
    assert len(mixes) > 2
    assert len(initializers(tmp_path / "m.onnx").keys() & set(mixes)) == 1


@with_onnx
def test_a_tensor_with_other_numbers_is_reported(tmp_path: Path) -> None:
    from vitcompress.export.onnx import check_tensors

    path = write(tmp_path / "m.safetensors", ROWS["vit"], "int4", share=2, transforms=())
    exported(path, "onnx", "m.onnx")
    artifact = LoadedArtifact.read(path)
    assert check_tensors(tmp_path / "m.onnx", artifact) > 0
    name = "blocks.0.mlp.fc1.weight"
    other = {**artifact.tensors, name: artifact.tensors[name] ^ 1}
    with pytest.raises(ExportError, match=name.replace(".", r"\.")):
        check_tensors(tmp_path / "m.onnx", replace(artifact, tensors=other))
    with pytest.raises(ExportError, match="missing: missing"):
        check_tensors(tmp_path / "m.onnx", replace(artifact, tensors={"missing": torch.zeros(2, 2)}))


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("vitcompress", "timm"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
images = torch.load(sys.argv[2])
torch.save(torch.export.load(sys.argv[1]).module()(images), sys.argv[3])
"""


@pytest.mark.thorough
def test_pt2_runs_where_neither_we_nor_timm_are(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", ROWS["beit"], "int8", share=2, transforms=("heads", "mlp"))
    done = exported(path, "pt2", "m.pt2")
    seen = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    torch.save(seen, tmp_path / "images.pt")
    words = [tmp_path / "m.pt2", tmp_path / "images.pt", tmp_path / "outputs.pt"]
    subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, words)],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with torch.inference_mode():
        torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), vitcompress.load(path)(seen))
    assert done.max_difference < 1e-5
    stored_bytes = sum(t.numel() * t.element_size() for t in load_file(path).values())
    assert done.tensor_bytes < 2 * stored_bytes  # vectors are float32; shared matrices are stored once, in int8


@with_executorch
@pytest.mark.filterwarnings("default")  # its packages warn
@pytest.mark.parametrize(("store", "least"), [("source", 3.0), ("int8", 2.0)])
def test_executorch_holds_what_is_shared_once(store: str, least: float, tmp_path: Path) -> None:
    wide = Row("vit", "vit_tiny_patch16_224", {**ROWS["vit"].args, "embed_dim": 128})
    sizes = {}
    for share in (1, 4):
        path = write(tmp_path / f"{share}.safetensors", wide, store, share=share, transforms=("heads", "mlp"))
        done = exported(path, "executorch", f"{share}.pte")
        assert done.max_difference < (1e-5 if store == "source" else 0.1) * done.largest_output
        sizes[share] = done.out_bytes
    assert sizes[1] > least * sizes[4]  # of four blocks


@pytest.mark.parametrize("missing", [True, False])
def test_executorch_says_what_it_needs(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vitcompress: Vitcompress
) -> None:
    path = write(tmp_path / "m.safetensors", ROWS["vit"], "int4", share=2, transforms=())
    packages = ["executorch"] if missing else []
    monkeypatch.setattr("vitcompress.runtime.extras.missing_packages", lambda extra: packages)
    ended = vitcompress("export", path, "--to", "executorch", "--out", tmp_path / "m.pte")
    assert ended.code == 2
    assert ("vitcompress[executorch]" if missing else "four bits") in ended.err
    assert sorted(listing(tmp_path)) == ["m.safetensors"]


def test_timm_gets_plain_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", ROWS["beit"], share=4, basis=5, matrices=False, transforms=())
    done = exported(path, "timm", "plain.safetensors")
    row = ROWS["beit"]
    plain = timm.create_model(row.architecture, **row.args, checkpoint_path=str(tmp_path / "plain.safetensors")).eval()
    with torch.inference_mode():
        expected = vitcompress.load(path)(row_images(row))
        torch.testing.assert_close(plain(row_images(row)), expected, rtol=1e-4, atol=1e-4)
    weights = load_file(tmp_path / "plain.safetensors")
    assert done.tensor_bytes == 4 * sum(t.numel() for t in plain.state_dict().values())
    assert weights["blocks.1.mlp.fc1.weight"].shape == plain.blocks[1].mlp.fc1.weight.shape
    assert "Full size" in done.notes[0]


@pytest.mark.parametrize(
    ("recipe", "why"),
    [({"share": 2, "transforms": ("heads",)}, "heads"), ({"share": 1, "width": 0.5, "transforms": ()}, "narrower")],
)
def test_timm_has_no_place_for_some(recipe: dict[str, Any], why: str, tmp_path: Path, vitcompress: Vitcompress) -> None:
    path = write(tmp_path / "m.safetensors", ROWS["vit"], **recipe)
    ended = vitcompress("export", path, "--to", "timm", "--out", tmp_path / "plain.safetensors")
    assert ended.code == 2
    assert why in ended.err
    assert sorted(listing(tmp_path)) == ["m.safetensors"]


def test_a_folder_for_the_hub_says_what_it_is_and_loads(mini: Path, images: Path, vitcompress: Vitcompress) -> None:
    out = mini.with_name("repo")
    ended = vitcompress("export", mini, "--to", "hf", "--out", out, "--data", images, "--json", "--quiet")
    assert ended.code == 0, ended.err
    done = json.loads(ended.out)
    assert (done["max_difference"], done["same_top1"], done["num_images"]) == (0, 10, 10)
    assert (out / "model.safetensors").read_bytes() == mini.read_bytes()
    assert {"README.md", "config.json", "model.safetensors"} <= listing(out).keys() <= hf.FILES
    card = (out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "vitcompress"
    assert front["license"] == "other"  # weights from a file are under a license that only the user knows
    for text in ("vitcompress.load(", "License", "Data", "parameters", read_manifest(mini).source_sha256):
        assert text in card, text
    loaded, first = load(out), load(mini)
    assert all(torch.equal(t, first.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert vitcompress("export", mini, "--to", "hf", "--out", out, "--quiet").code == 0  # replaces the earlier export
    (out / "notes.txt").write_text("mine")
    before = listing(out)
    ended = vitcompress("export", mini, "--to", "hf", "--out", out, "--quiet")
    assert (ended.code, "notes.txt" in ended.err) == (2, True)
    assert listing(out) == before
    assert sorted(p.name for p in mini.parent.iterdir()) == [mini.name, "repo"]


def load(path: Path) -> nn.Module:
    return vitcompress.load(path)


def test_a_folder_of_someone_elses_is_left_alone(mini: Path) -> None:
    out = mini.with_name("repo")
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(VitcompressError, match="was not written by vitcompress"):
        export.export(mini, "hf", out, num_images=1)
    assert listing(out) == {"config.json": b"{}"}


class Hub:
    """Stands in for huggingface_hub.HfApi and records the calls."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, fail: bool = False) -> None:
        self.calls, self.fail = [], fail

    def create_repo(self, repo: str, **options: Any) -> None:
        if self.fail:
            raise ConnectionError("401 Unauthorized")
        self.calls.append(("create_repo", {"repo": repo, **options}))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", {**options, "files": set(listing(options["folder_path"]))}))


def test_push_uploads_the_folder(mini: Path, monkeypatch: pytest.MonkeyPatch, vitcompress: Vitcompress) -> None:
    api = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    words = ["export", mini, "--to", "hf", "--out", mini.with_name("repo"), "--num-images", 1, "--push", "me/mini"]
    ended = vitcompress(*words)
    assert (ended.code, "license of its weights is not known" in ended.out) == (0, True)
    (first, create), (second, upload) = api.calls
    assert (first, create) == ("create_repo", {"repo": "me/mini", "exist_ok": True})
    assert (second, upload["repo_id"]) == ("upload_folder", "me/mini")
    assert {"README.md", "config.json", "model.safetensors"} <= upload["files"]
    api.fail = True
    ended = vitcompress(*words)
    assert ended.code == 2
    assert "401 Unauthorized" in ended.err
    assert mini.with_name("repo").is_dir()  # it is complete and can be uploaded later


def wrong_outputs(written: Written) -> Written:
    return replace(written, run=lambda images: written.run(images) + 1)


def wrong_size(written: Written) -> Written:
    return replace(written, limit_bytes=1000)


def no_graph(written: Written) -> Written:
    raise RuntimeError("aten.new_thing is not known\nand much more")


@pytest.mark.parametrize(("to", "name"), [("timm", "out.safetensors"), ("hf", "out")])
@pytest.mark.parametrize(
    ("harm", "why"), [(wrong_outputs, "outputs differ"), (wrong_size, "more than once"), (no_graph, "aten.new_thing")]
)
def test_a_wrong_result_ends_with_1_and_leaves_nothing(
    to: str, name: str, harm: Callable[[Written], Written], why: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vitcompress: Vitcompress,
) -> None:  # fmt: skip
    path = write(tmp_path / "m.safetensors", ROWS["vit"], share=2, transforms=())
    how = export.FORMATS[to]
    monkeypatch.setattr("vitcompress.export.hf.model_card", lambda artifact, picture: "")
    monkeypatch.setattr("vitcompress.export.hf.picture_of", lambda artifact: None)
    harmed = replace(how, write=lambda artifact, out: harm(how.write(artifact, out)))
    monkeypatch.setitem(export.FORMATS, to, harmed)
    before = listing(tmp_path)
    ended = vitcompress("export", path, "--to", to, "--out", tmp_path / name, "--num-images", 2)
    assert ended.code == 1
    assert why in ended.err
    assert listing(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_another_most_likely_class_is_found_unless_it_is_a_tie() -> None:
    class Student(nn.Module):
        num_classes = 2

        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[1.0, 1.0 - self.margin], [3.0, 0.0]])

        def __init__(self, margin: float) -> None:
            super().__init__()
            self.margin = margin

    def swapped(images: Tensor) -> Tensor:
        return torch.tensor([[1.0 - 5e-4, 1.0], [3.0, 0.0]])

    probe = Probe("two images", (torch.zeros(2, 3, 4, 4),), torch.tensor([0, 1]))
    with pytest.raises(ExportError, match="of 1 of 2 images differs"):
        compare_outputs(Student(1e-3), swapped, probe)
    tied = compare_outputs(Student(1e-4), swapped, probe)
    assert (tied.same_top1, tied.num_images, tied.top1, tied.artifact_top1) == (1, 2, 0, 50)
    with pytest.raises(ExportError, match="differ by nan"):
        compare_outputs(Student(0), lambda images: swapped(images) * torch.nan, probe)
    with pytest.raises(ExportError, match="outputs have shape"):
        compare_outputs(Student(0), lambda images: torch.zeros(2, 3), probe)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "onxx", "--out", "m.onnx"], "did you mean onnx?"),
        (["--to", "onnx", "--out", "m.pt2"], "must end in .onnx"),
        (["--to", "pt2", "--out", "m.pt2", "--push", "me/mini"], "--push"),
        (["--to", "pt2", "--out", "m.pt2", "--data", "nowhere"], "--data nowhere does not exist"),
        (["--to", "pt2", "--out", "nowhere/m.pt2"], "cannot write there"),
        (["--to", "hf", "--out", "artifact/mini.safetensors"], "is a file"),
    ],
    ids=["format", "suffix", "push", "data", "folder", "file"],
)
def test_mistakes_are_named(
    words: list[str], message: str, mini: Path, monkeypatch: pytest.MonkeyPatch, vitcompress: Vitcompress
) -> None:
    monkeypatch.chdir(mini.parents[1])
    before = listing(Path())
    ended = vitcompress("export", mini, *words, "--quiet")
    assert ended.code == 2
    assert message in ended.err
    assert listing(Path()) == before


def test_a_missing_extra_says_what_to_install(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitcompress.runtime.extras.find_spec", lambda name: None)
    with pytest.raises(VitcompressError, match="onnx and onnxruntime and onnxscript") as error:
        exported(mini, "onnx", "m.onnx")
    assert error.value.hint == "pip install 'vitcompress[onnx]'"


@with_onnx
@pytest.mark.skipif(not (DATA / "deit_tiny.safetensors").is_file(), reason="../shared/data is not here")
@pytest.mark.slow
@pytest.mark.parametrize("store", ["source", "int8", "int4"])
def test_deit_tiny_keeps_size_and_classes_on_real_images(store: str, tmp_path: Path, vitcompress: Vitcompress) -> None:
    path = tmp_path / "m.safetensors"
    words = ["deit_tiny", "--checkpoint", DATA / "deit_tiny.safetensors", "--share", 2, "--steps", 0, "--store", store]
    assert vitcompress("compress", *words, "--no-baselines", "--quiet", "--out", path).code == 0
    pictures = DATA / "imagenet-compatible"
    ended = vitcompress("export", path, "--to", "onnx", "--out", tmp_path / "m.onnx", "--data", pictures, "--json")
    assert ended.code == 0, ended.err
    done = json.loads(ended.out)
    assert done["same_top1"] == done["num_images"] == 64
    assert done["max_difference"] < 1e-4
    assert done["out_bytes"] < 1.05 * done["artifact_bytes"]


@pytest.mark.parametrize("licence", ["mit\nmodel-index: x", "<b>", 7, "mit](https://x.example)"])
def test_a_card_is_nothing_but_what_it_says(licence: object, mini: Path) -> None:
    name = "hf-hub:a/b\x85<script>`x`[y](https://x.example)![z](u)"
    manifest = read_manifest(mini)
    odd = {**manifest.source, "name": name, "pretrained_cfg": {"license": licence}}
    harmless = replace(
        manifest, source=odd, recipe={"model": {}}, report={**manifest.report, "model": name, "data": name}
    )
    text = model_card(replace(LoadedArtifact.read(mini), manifest=harmless), picture=None)
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front.get("base_model")) == ("other", None)
    assert "<script>" not in text
    assert "model-index" not in text
    body = text.partition("## Where it comes from")[2]
    assert re.search(r"(?<!\\)[\[!]", body) is None
