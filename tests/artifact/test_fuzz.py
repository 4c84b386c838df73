"""Loading any file gives the model that its tensors describe, or an `ArtifactError`, and soon.

Most cases get a valid digest; otherwise each would be refused as altered before anything else is
tested.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import vitcompress
from tests.factories import compressed, images
from vitcompress.artifact import tensorfile
from vitcompress.artifact.digest import tensor_label
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.read import read_manifest
from vitcompress.artifact.tensorfile import strict_json
from vitcompress.artifact.write import write
from vitcompress.errors import ArtifactError
from vitcompress.plans.model import Plan
from vitcompress.pretrained.build import build_model
from vitcompress.pretrained.data_config import data_config
from vitcompress.pretrained.resolve import Source
from vitcompress.quantize.store import donor_tensors, round_to, stored_tensors
from vitcompress.recipe import ModelRecipe

Base = tuple[Path, bytes, nn.Module]
SPARE_BYTES = 48 << 20  # for the allocator and Python, whatever the file
MAX_SECONDS = 30
DEEP = "\x01deep"  # stands for nested lists that json.dumps cannot write

BASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3},
            {"share": 2}, "source"),
    "swin": ("swin_tiny_patch4_window7_224",
             {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": [2, 2],
              "num_heads": [2, 4]},
             {"share": 2}, "int8"),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
            {"share": 1, "adapter_rank": 2, "matrices": False}, "fp16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    """Small artifacts of three families; their folder takes the damaged ones."""
    folder = tmp_path_factory.mktemp("fuzz")
    return [_base(folder / f"{name}.safetensors", *row) for name, row in BASES.items()]


def _base(path: Path, architecture: str, args: dict[str, Any], recipe: dict[str, Any], store: str) -> Base:
    source = Source(architecture, architecture, {**args, "num_classes": 3})
    torch.manual_seed(0)
    teacher = build_model(source).eval()
    student, plan = compressed(teacher, **recipe)
    stored = stored_tensors(student, store)
    round_to(student, stored, store)
    write(path, student, _manifest(source, plan, teacher, store), images(student), stored=stored)
    return path, path.read_bytes(), vitcompress.load(path)


def _manifest(source: Source, plan: Plan, teacher: nn.Module, store: str) -> Manifest:
    described = {"name": source.name, "architecture": source.architecture, "model_args": source.model_args}
    return Manifest(
        source={**described, "pretrained_cfg": {"num_classes": 3, "label_names": ["a", "b", "c"]}},
        source_sha256="", plan=plan, data_config=data_config(teacher, ModelRecipe(source.name)),
        recipe={"plan": {"share": 2}}, report={"schema_version": 1}, versions={"torch": "2"}, classes=("a", "b", "c"),
        lineage=({"name": "x", "sha256": "0" * 64, "command": "c"},), store=store,
    )  # fmt: skip


# --- damage

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([
        -1, 0, 1, 2, 3, 4, 7, 64, 224, 4096, 65_536, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30, 10**400,
        -(10**30), 1e308, "", "\ud800", "\x00", "\u202e", "é" * 5000, "[/bold]", "hf-hub:a/b", "local-dir:/",
        "/etc/passwd", "../../x", "__class__", "os.system", "resnet50", "vit_giant_patch14_dinov2",
        "forward", DEEP + "20", DEEP + "400", DEEP + "100000", "blocks.0", "attn", "mlp.fc1.weight",
        "attn.qkv", "token_conv", "swin_large_patch4_window12_384",
    ]),
    st.recursive(
        st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6
    ),
)  # fmt: skip
ARGUMENTS = st.sampled_from([
    "depth", "depths", "embed_dim", "img_size", "patch_size", "num_heads", "window_size", "in_chans", "num_classes",
    "mlp_ratio", "reg_tokens", "drop_rate", "drop_path_rate", "init_values", "class_token", "pos_embed", "global_pool",
    "norm_layer", "act_layer", "mlp_layer", "attn_layer", "block_fn", "embed_layer", "weight_init", "norm_eps",
    "qk_norm", "pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "device",
    "dtype", "features_only", "pruned", "scriptable", "model_cfg", "kwargs_filter", "use_naflex", "dynamic_img_size",
    "head_dim", "ref_feat_shape", "rope_type", "rope_temperature", "num_reg_tokens", "fix_init", "args", "kwargs",
    "self", "strict_img_size",
])  # fmt: skip


@st.composite
def harms(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A function that damages a file: any bytes, its list of tensors or its manifest."""
    kind = draw(st.sampled_from(["bytes", "tensors", "manifest", "manifest", "arguments", "both"]))
    if kind == "bytes":
        return draw(_byte_harms())
    steps: list[Callable[[dict[str, Any]], None]] = []
    if kind in ("tensors", "both"):
        steps += [draw(_tensor_harms()) for _ in range(draw(st.integers(1, 2)))]
    if kind in ("manifest", "both"):
        steps += [draw(_manifest_harms()) for _ in range(draw(st.integers(1, 2)))]
    if kind == "arguments":
        name, value = draw(ARGUMENTS), draw(ODD)
        steps.append(lambda tree: tree["manifest"]["source"]["model_args"].update({name: value}))
    sealed = draw(st.integers(0, 9)) > 0
    return lambda data: _changed(data, steps, sealed=sealed)


@st.composite
def _byte_harms(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    kind = draw(st.sampled_from(["flip", "cut", "double", "drop", "zero", "noise"]))
    where, length, noise = draw(st.floats(0, 1)), draw(st.integers(1, 3000)), draw(st.binary(min_size=1, max_size=40))
    in_header = draw(st.booleans())

    def harm(data: bytes) -> bytes:
        (header,) = struct.unpack("<Q", data[:8])
        at = int(where * ((8 + header if in_header else len(data)) - 1))
        part = data[at : at + length]
        return {
            "flip": data[:at] + bytes([data[at] ^ (1 << length % 8)]) + data[at + 1 :],
            "cut": data[:at],
            "double": data[:at] + part + data[at:],
            "drop": data[:at] + data[at + length :],
            "zero": data[:at] + bytes(len(part)) + data[at + len(part) :],
            "noise": data[:at] + noise + data[at + len(noise) :],
        }[kind]

    return harm


@st.composite
def _manifest_harms(draw: st.DrawFn) -> Callable[[dict[str, Any]], None]:
    kind = draw(st.sampled_from(["set", "set", "set", "drop", "add", "double"]))
    where, value, name = draw(st.integers(0, 10_000)), draw(ODD), draw(st.text(max_size=8) | ARGUMENTS)

    def harm(tree: dict[str, Any]) -> None:
        places = list(_places(tree["manifest"]))
        if not places:
            return
        holder, key = places[where % len(places)]
        if kind == "set":
            holder[key] = value
        elif kind == "drop":
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[name] = value
        elif isinstance(holder, list):
            holder.insert(key, holder[key])

    return harm


@st.composite
def _tensor_harms(draw: st.DrawFn) -> Callable[[dict[str, Any]], None]:
    kind = draw(st.sampled_from(["drop", "extra", "rename", "swap", "shape", "dtype", "offsets", "odd", "field"]))
    first, second = draw(st.integers(0, 10_000)), draw(st.integers(0, 10_000))
    numbers = draw(st.lists(st.integers() | st.sampled_from([0, 1, 10**9, 10**12, 2**63]), max_size=5))
    value, text = draw(ODD), draw(st.text(max_size=8))
    dtype = draw(st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "x"]))

    def harm(tree: dict[str, Any]) -> None:
        tensors = tree["tensors"]
        names = sorted(tensors)
        if not names:
            return
        one, other = names[first % len(names)], names[second % len(names)]
        if not isinstance(tensors[one], dict) or not isinstance(tensors[other], dict):
            return
        if kind == "drop":
            del tensors[one]
        elif kind == "extra":
            tensors[text] = {"dtype": dtype, "shape": numbers, "data_offsets": [0, 0]}
        elif kind == "rename":
            tensors[text] = tensors.pop(one)
        elif kind == "swap":
            tensors[one], tensors[other] = tensors[other], tensors[one]
        elif kind == "odd":
            tensors[one] = value
        elif kind == "field":
            tensors[one][text] = value
        else:
            tensors[one][{"shape": "shape", "dtype": "dtype", "offsets": "data_offsets"}[kind]] = (
                dtype if kind == "dtype" else numbers if first % 2 else value
            )

    return harm


def _places(value: Any) -> Any:
    """Every item of lists and objects, as holder and key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _changed(data: bytes, steps: list[Callable[[dict[str, Any]], None]], *, sealed: bool) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    tensors = json.loads(data[8 : 8 + length])
    manifest = json.loads(tensors.pop("__metadata__")["vitcompress"])
    tree = {"tensors": tensors, "manifest": manifest}
    for step in steps:
        step(tree)
    manifest = tree["manifest"]
    if sealed and isinstance(manifest, dict):
        _seal(manifest, tree["tensors"], data[8 + length :])
    header = _json({"__metadata__": {"vitcompress": _json(manifest)}, **tree["tensors"]}).encode("utf-8", "replace")
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _json(tree: Any) -> str:
    text = json.dumps(tree)
    for depth in (20, 400, 100_000):
        text = text.replace(json.dumps(DEEP + str(depth)), "[" * depth + "]" * depth)
    return text


def _seal(manifest: dict[str, Any], tensors: dict[str, Any], data: bytes) -> None:
    """Set the digest in `manifest` that fits the damaged file, if it can be computed."""
    manifest.pop("sha256", None)
    digest = hashlib.sha256()
    try:
        tree = json.loads(_json(manifest))
        for name in sorted(tensors):
            place = tensors[name]
            start, end = place["data_offsets"]
            digest.update(tensor_label(name, f"torch.{tensorfile._DTYPES[place['dtype']][0]}", place["shape"]))
            digest.update(data[start:end])
        content = f"{json.dumps(tree, sort_keys=True)}{digest.hexdigest()}".encode()
    except (LookupError, TypeError, ValueError, RecursionError, AttributeError):
        content = b""
    manifest["sha256"] = hashlib.sha256(content).hexdigest()


# --- what must happen


def outcome(path: Path, original: nn.Module, data: bytes) -> str:
    """Load a file: "refused" or "loaded"; anything else fails."""
    path.write_bytes(data)
    before, start, tables = _memory(reset=True), time.perf_counter(), 0
    model = message = None
    try:
        model = vitcompress.load(path)
    except ArtifactError as error:
        message = str(error)
    if model is None:
        assert message is not None
        assert path.name in message
        message.encode("utf-8")  # it can be printed
    else:
        stored = load_file(path)
        held = donor_tensors(model)
        tables = sum(t.numel() * t.element_size() for t in model.buffers())
        assert held.keys() == {name for name in stored if not name.endswith(".scale")}
        for name, t in held.items():
            assert t.shape == donor_tensors(original)[name].shape
            if stored[name].is_floating_point():
                assert t.dtype == torch.float32
                assert torch.equal(t.detach(), stored[name].float()) or bool(t.isnan().any())
    assert time.perf_counter() - start < MAX_SECONDS
    assert tables < (32 << 20) + len(data)
    assert (
        _memory(reset=False) - before < 2 * len(data) + 4 * tables + SPARE_BYTES
    )  # timm computes masks in a few steps
    return "refused" if model is None else "loaded"


def _memory(*, reset: bool) -> int:
    """Bytes of the resident set, now or at its peak since a reset; 0 if not on Linux."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    wanted = "VmRSS:" if reset else "VmHWM:"
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted)), 0)


CASES = st.tuples(st.integers(0, len(BASES) - 1), harms())
RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


def _try(bases: list[Base], case: tuple[int, Callable[[bytes], bytes]]) -> None:
    path, data, model = bases[case[0]]
    outcome(path.with_name("harmed.safetensors"), model, case[1](data))


@pytest.mark.thorough
@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=RELAXED, database=None)
@given(case=CASES)
def test_a_harmed_file_is_refused_or_the_model_that_it_holds(
    bases: list[Base], case: tuple[int, Callable[[bytes], bytes]]
) -> None:
    _try(bases, case)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(10))
def test_twenty_thousand_harmed_files_are_too(bases: list[Base], piece: int) -> None:
    @seed(piece)
    @settings(max_examples=2000, deadline=None, suppress_health_check=RELAXED, database=None)
    @given(case=CASES)
    def run(case: tuple[int, Callable[[bytes], bytes]]) -> None:
        _try(bases, case)

    run()


def test_a_file_made_anew_without_harm_is_loaded(bases: list[Base]) -> None:
    """So the cases above are refused for their damage, not for how these tests rewrite files."""
    for path, data, model in bases:
        assert outcome(path.with_name("again.safetensors"), model, _changed(data, [], sealed=True)) == "loaded"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("depth", 10**9, "depth"),
        ("embed_dim", 10**9, "embed_dim"),
        ("img_size", 10**9, "img_size"),
        ("num_heads", 10**9, "num_heads"),
        ("checkpoint_path", "/etc/passwd", "checkpoint_path"),
        ("pretrained", True, "pretrained"),
        ("pretrained_cfg", "x", "pretrained_cfg"),
        ("device", "cuda", "device"),
        ("norm_layer", "os.system", "norm_layer"),
        ("features_only", True, "features_only"),
    ],
)
def test_an_argument_that_builds_something_else_is_named(
    name: str, value: object, message: str, bases: list[Base]
) -> None:
    path, data, model = bases[0]
    place = path.with_name("argument.safetensors")

    def change(tree: dict[str, Any]) -> None:
        tree["manifest"]["source"]["model_args"][name] = value

    assert outcome(place, model, _changed(data, [change], sealed=True)) == "refused"
    with pytest.raises(ArtifactError, match=message):
        vitcompress.load(place)


@pytest.mark.parametrize("name", ["resnet50", "hf-hub:a/b", "local-dir:/tmp", "vit_tiny_patch16_224/..", "../x", ""])
def test_an_architecture_that_is_not_ours_is_refused(name: str, bases: list[Base]) -> None:
    path, data, model = bases[0]

    def change(tree: dict[str, Any]) -> None:
        tree["manifest"]["source"]["architecture"] = name

    place = path.with_name("architecture.safetensors")
    assert outcome(place, model, _changed(data, [change], sealed=True)) == "refused"


TWICE: dict[str, Callable[[dict[str, Any]], None]] = {
    "shared": lambda plan: plan["groups"][0].update(shared=plan["groups"][0]["shared"] * 1_000),
    "bases": lambda plan: plan["groups"][0].update(bases=["attn.qkv"] * 2),
    "blocks": lambda plan: plan["groups"][0].update(blocks=plan["groups"][0]["blocks"] * 2),
    "transforms": lambda plan: plan.update(transforms=["heads"] * 2),
}


@pytest.mark.parametrize("where", TWICE)
def test_names_that_are_in_a_plan_twice_are_refused_before_anything_is_built(
    where: str, bases: list[Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data, _ = bases[0]
    place = path.with_name("twice.safetensors")
    place.write_bytes(_changed(data, [lambda tree: TWICE[where](tree["manifest"]["plan"])], sealed=True))
    monkeypatch.setattr("vitcompress.artifact.load.empty_model", lambda source: pytest.fail("it was built"))
    with pytest.raises(ArtifactError, match=rf"{where} has a name twice|the limit is 512"):
        vitcompress.load(place)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input_size", [3, 16, 16], "its data config has images of"),
        ("input_size", [1, 32, 32], "do not have 1 channels"),
        ("mean", [0.5, 0.5], "do not have 3 channels"),
        ("std", [1e-60] * 3, "std"),
        ("crop_pct", 1e-9, "crop_pct"),
        ("interpolation", "random", "interpolation"),
    ],
)
def test_images_that_the_model_does_not_take_are_refused(
    field: str, value: Any, message: str, bases: list[Base]
) -> None:
    path, data, _ = bases[0]
    place = path.with_name("images.safetensors")
    place.write_bytes(
        _changed(data, [lambda tree: tree["manifest"]["data_config"].update({field: value})], sealed=True)
    )
    with pytest.raises(ArtifactError, match=message):
        vitcompress.load(place)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_json_that_names_no_number_is_refused(number: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        strict_json(f'{{"ratio": {number}}}')


def test_a_tensors_name_that_a_terminal_would_obey_is_refused_and_not_shown(bases: list[Base]) -> None:
    path, data, _ = bases[0]
    place = path.with_name("name.safetensors")
    for value in ({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "x"):

        def change(tree: dict[str, Any], value: object = value) -> None:
            tree["tensors"]["z\x1b]0;x\x07"] = value

        place.write_bytes(_changed(data, [change], sealed=False))
        with pytest.raises(ArtifactError, match="cannot be") as caught:
            vitcompress.load(place)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["\x1b[2J", "\r", "\x9b31m", "\x07", "\udc80"])
def test_text_that_a_terminal_would_obey_is_not_written_and_not_read(text: str, bases: list[Base]) -> None:
    path, data, model = bases[0]

    def change(tree: dict[str, Any]) -> None:
        tree["manifest"]["report"]["command"] = f"vitcompress {text}"

    assert outcome(path.with_name("text.safetensors"), model, _changed(data, [change], sealed=True)) == "refused"
    manifest = dataclasses.replace(read_manifest(path), report={"command": f"vitcompress {text}"})
    place = path.with_name("written.safetensors")
    write(place, model, manifest, images(model))
    assert "?" in read_manifest(place).report["command"]


@pytest.mark.parametrize("name", ["/etc/passwd", "mini.safetensors", "../mini", "resnet50/x", ""])
def test_a_source_that_is_a_path_is_refused(name: str, bases: list[Base]) -> None:
    path, data, model = bases[0]

    def change(tree: dict[str, Any]) -> None:
        tree["manifest"]["source"]["name"] = name

    assert outcome(path.with_name("name.safetensors"), model, _changed(data, [change], sealed=True)) == "refused"


def test_an_architecture_of_another_kind_is_not_even_built(bases: list[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    path, data, _ = bases[0]

    def change(tree: dict[str, Any]) -> None:
        tree["manifest"]["source"].update(architecture="resnet50", model_args={"layers": [65_536] * 4})

    path.with_name("resnet.safetensors").write_bytes(_changed(data, [change], sealed=True))
    monkeypatch.setattr("vitcompress.artifact.load.empty_model", lambda source: pytest.fail("it was built"))
    with pytest.raises(ArtifactError, match="resnet50"):
        vitcompress.load(path.with_name("resnet.safetensors"))


def test_a_small_file_that_claims_a_terabyte_is_refused_at_once(bases: list[Base], tmp_path: Path) -> None:
    place = {"dtype": "F32", "shape": [1 << 19, 1 << 19], "data_offsets": [0, 1 << 40]}
    header = json.dumps({"__metadata__": {"vitcompress": "{}"}, "x": place}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(800))
    assert outcome(tmp_path / "x.safetensors", bases[0][2], (tmp_path / "x.safetensors").read_bytes()) == "refused"


@pytest.mark.parametrize("size", [5_757, 32_768])
def test_a_large_window_table_is_refused_before_it_is_computed(size: int, bases: list[Base]) -> None:
    path, data, model = bases[1]

    def change(tree: dict[str, Any]) -> None:
        tree["manifest"]["source"]["model_args"]["img_size"] = size

    place = path.with_name("window.safetensors")
    assert outcome(place, model, _changed(data, [change], sealed=True)) == "refused"
    with pytest.raises(ArtifactError, match="tables"):
        vitcompress.load(place)
