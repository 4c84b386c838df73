"""Parts of blocks that are left out: sizes, identities, starts, files, exports and errors."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from rich.console import Console
from torch import Tensor, nn

from tests.artifact.helpers import manifest_of
from tests.factories import ROWS, build, images, row_images, student_of, tiny
from tests.report.samples import REPORT, shown
from tests.search.factories import lively
from vitcompress import export
from vitcompress.artifact.load import load
from vitcompress.artifact.manifest import parse_header, to_tree
from vitcompress.artifact.read import read_manifest
from vitcompress.artifact.write import write
from vitcompress.distill.fading import fading
from vitcompress.distill.matching import ComparedModel, match_models
from vitcompress.distill.student import training_student
from vitcompress.errors import ArtifactError, PlanError, RecipeError, VitcompressError
from vitcompress.families.registry import family_of
from vitcompress.families.skip import skippable
from vitcompress.families.widths import Widths
from vitcompress.initialize.start import needs_images, start_student
from vitcompress.layers.constant import Constant
from vitcompress.measure.macs import macs_of, with_macs
from vitcompress.plans.make import plan_of, with_sizes_on
from vitcompress.plans.model import Group, Plan
from vitcompress.quantize.codecs import STORES, num_bytes
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.recipe import DistillRecipe
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import to_json
from vitcompress.report.sharing import describe_layers
from vitcompress.report.terminal import print_plan
from vitcompress.runtime.extras import missing_packages

PARTS: tuple[tuple[str, ...], ...] = (("attn",), ("mlp",), ("attn", "mlp"))
ROWS_OF_VIT = ("vit", "deit3", "dinov2", "dinov2 registers", "deit distilled", "siglip", "vit dynamic", "headless")


def skipping(model: nn.Module, skipped: Mapping[int, tuple[str, ...]], transforms: tuple[str, ...] = ()) -> Plan:
    """A plan whose blocks stay as they are but for skipped parts, by the block's number."""
    family = family_of(model, "tiny")
    groups = [
        Group((block,), (), skipped=skipped.get(number, ()))  # type: ignore[arg-type]
        for number, block in enumerate(family.block_names(model))
    ]
    return plan_of(model, family, groups, transforms, 3)


def randomised(student: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return student.eval()


# --- sizes


@pytest.mark.parametrize("transforms", [(), ("heads",), ("mlp",), ("heads", "mlp", "rpe")], ids=str)
@pytest.mark.parametrize("row", ["vit", "deit3", "dinov2", "dinov2 registers"])
def test_the_plan_counts_what_is_built(row: str, transforms: tuple[str, ...]) -> None:
    teacher = build(ROWS[row])
    plan = skipping(teacher, dict(enumerate(PARTS)), transforms)
    student = student_of(teacher, plan).eval()
    assert sum(p.numel() for p in student.parameters()) == plan.size.student_params < plan.size.teacher_params
    for store in STORES:
        assert num_bytes(stored_tensors(student, store)) == with_sizes_on(plan, teacher, store).size.student_bytes
    assert student(row_images(ROWS[row])).isfinite().all()
    names = [name for name, _ in student.named_parameters()]
    kept = [name for name in names if name.startswith("blocks.2.")]
    assert kept == ["blocks.2.attn.bias", "blocks.2.mlp.bias"]  # neither norms, LayerScale nor transformations
    assert ("blocks.0.mlp.convolution.weight" in names) == ("blocks.3.mlp.convolution.weight" in names)
    assert any("mix_logits" in name for name in names if name.startswith("blocks.1.")) == ("heads" in transforms)
    assert not any("mix_logits" in name or "rpe" in name for name in names if name.startswith("blocks.0."))


def test_what_is_left_out_is_not_computed() -> None:
    teacher = tiny()
    whole = macs_of(teacher, (3, 32, 32))
    plan = with_macs(skipping(teacher, {0: ("mlp",), 1: ("attn",), 2: ("attn", "mlp")}), teacher, (3, 32, 32))
    mlp, attention = 17 * 2 * 24 * 96, 17 * 4 * 24 * 24 + 2 * 17 * 17 * 24
    assert plan.size.student_macs == whole - 2 * mlp - 2 * attention


# --- identities


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("row", ROWS_OF_VIT)
def test_a_part_that_writes_a_constant_is_that_constant(row: str, parts: tuple[str, ...]) -> None:
    teacher = build(ROWS[row])
    student = student_of(teacher, skipping(teacher, {1: parts})).eval()
    with torch.no_grad():
        for part, layer, scale in (("attn", "attn.proj", "ls1"), ("mlp", "mlp.fc2", "ls2")):
            if part in parts:
                teacher.get_parameter(f"blocks.1.{layer}.weight").zero_()
                scaling: Any = teacher.get_submodule(f"blocks.1.{scale}")
                bias = getattr(scaling, "gamma", 1.0) * teacher.get_parameter(f"blocks.1.{layer}.bias")
                student.get_parameter(f"blocks.1.{part}.bias").copy_(bias)
        x = row_images(ROWS[row])
        expected = teacher(x)
        torch.testing.assert_close(student(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_constant_is_zero_at_first_and_takes_what_the_part_took() -> None:
    constant, x = Constant(4, dtype=torch.double), torch.randn(2, 3, 4)
    assert torch.equal(constant(x, attn_mask=None, is_causal=False), torch.zeros(2, 3, 4).double())
    with torch.no_grad():
        constant.bias.copy_(torch.arange(4))
    assert torch.equal(constant(x)[1, 2], torch.arange(4).double())
    assert repr(constant) == "Constant(dim=4)"


def test_the_student_is_still_timms_model() -> None:
    teacher = tiny()
    student = student_of(teacher, skipping(teacher, {0: ("attn",), 3: ("attn", "mlp")})).eval()
    final, middle = student.forward_intermediates(images(teacher), indices=[1, 3])  # type: ignore[operator]
    assert [m.shape for m in middle] == [(2, 24, 4, 4)] * 2
    assert final.shape == (2, 17, 24)
    mask = torch.ones(2, 1, 17, 17, dtype=torch.bool)
    assert student.forward_features(images(teacher), attn_mask=mask).shape == (2, 17, 24)  # type: ignore[operator]
    student.set_grad_checkpointing(True)  # type: ignore[operator]
    student.train()(images(teacher)).sum().backward()


# --- starts


def started(teacher: nn.Module, plan: Plan, x: Tensor) -> nn.Module:
    student = student_of(teacher, plan).eval()
    assert needs_images(plan, "first")
    start_student(student, teacher, plan, lambda: x.split(16), "first")
    return student


@pytest.mark.parametrize("variant", ["vit", "layer-scale"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_constant_starts_as_the_mean_of_what_it_replaces(
    part: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitcompress.initialize.importance.FLOOR", 1.0)  # all tokens count alike
    teacher = tiny(variant)
    x, written = images(teacher, 40), list[Tensor]()
    scale = teacher.get_submodule(f"blocks.1.{'ls1' if part == 'attn' else 'ls2'}")
    scale.register_forward_hook(lambda module, args, output: written.append(output))
    with torch.no_grad():
        teacher(x)
    mean = written[0].mean((0, 1))  # the student's stream is the teacher's so far: nothing to correct
    student = started(teacher, skipping(teacher, {1: (part,)}), x)
    torch.testing.assert_close(student.get_parameter(f"blocks.1.{part}.bias"), mean, rtol=1e-4, atol=1e-5)
    for name, p in student.named_parameters():
        assert name == f"blocks.1.{part}.bias" or torch.equal(p, teacher.get_parameter(name))


def test_tokens_count_as_much_as_predictions_depend_on_them() -> None:
    teacher = tiny()
    x, written = images(teacher, 40), list[Tensor]()
    teacher.get_submodule("blocks.3.mlp").register_forward_hook(lambda m, args, output: written.append(output))
    with torch.no_grad():
        teacher(x)
    student = started(teacher, skipping(teacher, {3: ("mlp",)}), x)
    means = written[0].mean(0)  # only the class token of the last block is read: half of all weight
    expected = (means[0] * (0.5 + 0.5 * 17) + means[1:].sum(0) * 0.5) / 17
    torch.testing.assert_close(student.get_parameter("blocks.3.mlp.bias"), expected, rtol=1e-4, atol=1e-5)


def test_a_start_is_better_than_nothing_in_place_of_the_parts() -> None:
    teacher = lively()
    x = images(teacher, 96)
    plan = skipping(teacher, {0: ("mlp",), 1: ("attn",), 2: ("mlp",)})
    start, zero = started(teacher, plan, x[:64]), student_of(teacher, plan).eval()
    with torch.no_grad():
        errors = [(model(x[64:]) - teacher(x[64:])).square().mean() for model in (start, zero)]
    assert errors[0] < 0.8 * errors[1]


def test_a_narrow_or_factored_part_beside_a_skipped_one_starts() -> None:
    teacher = tiny("layer-scale")
    x = images(teacher, 48)
    groups = [
        Group(("blocks.0",), (), widths=Widths(hidden=48), skipped=("attn",)),
        Group(("blocks.1",), (), widths=Widths(qk=4, v=4), skipped=("mlp",)),
        Group(("blocks.2",), (), {"mlp.fc1": 12, "mlp.fc2": 12}, skipped=("attn",)),
        Group(("blocks.3",), (), {"attn.qkv": 12, "attn.proj": 12}, skipped=("mlp",)),
    ]
    plan = plan_of(teacher, family_of(teacher, "tiny"), groups, (), 3)
    student, zero = started(teacher, plan, x), student_of(teacher, plan).eval()
    assert sum(p.numel() for p in student.parameters()) == plan.size.student_params
    assert all(p.isfinite().all() for p in student.parameters())
    with torch.no_grad():
        errors = [(model(x) - teacher(x)).square().mean() for model in (student, zero)]
    assert errors[0] < 0.8 * errors[1]


def test_every_block_of_a_group_has_a_constant_of_its_own() -> None:
    teacher = tiny()
    x, family = images(teacher, 48), family_of(teacher, "tiny")
    matrices = ("mlp.fc1.weight", "mlp.fc2.weight")
    rest = [Group(("blocks.2",), ()), Group(("blocks.3",), ())]
    group = Group(("blocks.0", "blocks.1"), matrices, dict.fromkeys(("mlp.fc1", "mlp.fc2"), 2), skipped=("attn",))
    student = started(teacher, plan_of(teacher, family, [group, *rest], (), 3), x)
    alone = started(teacher, skipping(teacher, {0: ("attn",)}), x)
    first, second = (student.get_parameter(f"blocks.{number}.attn.bias") for number in (0, 1))
    torch.testing.assert_close(first, alone.get_parameter("blocks.0.attn.bias"))
    assert second.abs().max() > 0.01
    assert not torch.allclose(first, second, rtol=0.1)
    narrow = Group(("blocks.0", "blocks.1"), matrices, widths=Widths(hidden=48), skipped=("attn",))
    student = started(teacher, plan_of(teacher, family, [narrow, *rest], (), 3), x)
    assert torch.equal(student.get_parameter("blocks.0.mlp.fc2.bias"), student.get_parameter("blocks.1.mlp.fc2.bias"))
    torch.testing.assert_close(student.get_parameter("blocks.1.attn.bias"), second, rtol=0.3, atol=0.05)


# --- errors


@pytest.mark.parametrize(
    ("group", "named"),
    [
        (Group(("blocks.0",), (), widths=Widths(hidden=48), skipped=("mlp",)), "mlp.hidden"),
        (Group(("blocks.0",), (), widths=Widths(qk=4), skipped=("attn",)), "attn.qk"),
        (Group(("blocks.0",), (), widths=Widths(v=4), skipped=("attn", "mlp")), "attn.v"),
        (Group(("blocks.0",), (), {"mlp.fc1": 2}, skipped=("mlp",)), "mlp.fc1"),
        (Group(("blocks.0",), ("attn.qkv.weight",), skipped=("attn",)), "attn.qkv.weight"),
        (Group(("blocks.0",), (), skipped=("mlp", "mlp")), "mlp"),
    ],
)  # fmt: skip
def test_a_part_that_is_skipped_cannot_be_changed_too(group: Group, named: str) -> None:
    teacher = tiny()
    plan = dataclasses.replace(skipping(teacher, {}), groups=(group, *skipping(teacher, {}).groups[1:]))
    with pytest.raises(PlanError, match=f"parts that the model does not have: {named}"):
        student_of(teacher, plan)


@pytest.mark.parametrize("row", ["swin", "swin v2", "beit", "eva02", "dinov2 swiglu"])
def test_parts_that_are_not_plain_cannot_be_skipped(row: str) -> None:
    teacher = build(ROWS[row])
    plan = skipping(teacher, {})
    block: Any = teacher.get_submodule(plan.groups[0].donor)
    assert skippable(block) == (("attn",) if row == "dinov2 swiglu" else ())
    group = dataclasses.replace(plan.groups[0], skipped=("mlp",))
    with pytest.raises(PlanError, match="parts that the model does not have: mlp"):
        student_of(teacher, dataclasses.replace(plan, groups=(group, *plan.groups[1:])))


# --- files


def written(
    path: Path, variant: str, store: str = "source", transforms: tuple[str, ...] = ()
) -> tuple[nn.Module, Plan]:
    teacher = tiny(variant)
    plan = skipping(teacher, dict(enumerate(PARTS)), transforms)
    student = randomised(student_of(teacher, plan))
    stored = stored_tensors(student, store)
    round_to(student, stored, store)
    manifest = dataclasses.replace(manifest_of(teacher, plan, variant), store=store, report=to_json(REPORT))
    write(path, student, manifest, images(student), stored=stored)
    return student, plan


@pytest.mark.parametrize("store", ["source", "fp16", "int8", "int4"])
@pytest.mark.parametrize("variant", ["vit", "layer-scale"])
def test_a_file_gives_the_same_outputs(variant: str, store: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    student, plan = written(path, variant, store, ("heads", "mlp"))
    assert read_manifest(path).plan.groups == plan.groups
    x = images(student)
    with torch.inference_mode():
        expected = student(x)
        assert torch.equal(load(path)(x), expected)
        torch.testing.assert_close(load(path, keep_quantized=True)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skipped", [["head"], ["attn", "attn"], ["attn", "mlp", "attn"], "attn", None])
def test_a_file_with_other_skipped_parts_is_refused(skipped: Any, tmp_path: Path) -> None:
    teacher = tiny()
    tree = to_tree(manifest_of(teacher, skipping(teacher, {0: ("attn",)}), "vit"))
    tree["plan"]["groups"][0]["skipped"] = skipped
    with pytest.raises(ArtifactError, match="skipped"):
        parse_header(tmp_path / "m.safetensors", json.dumps(tree))


def test_a_group_from_before_skips_nothing() -> None:
    group = TypeAdapter(Group).validate_python({"blocks": ["blocks.0"], "shared": [], "ranks": {}, "bases": []})
    assert group.skipped == ()
    assert group.is_plain
    assert not dataclasses.replace(group, skipped=("mlp",)).is_plain


# --- training


def test_what_is_left_out_does_not_fade() -> None:
    teacher = tiny()
    both = ("mlp.fc1.weight", "mlp.fc2.weight")
    family = family_of(teacher, "tiny")
    groups = [
        Group(("blocks.0", "blocks.1"), both, skipped=("attn",)),
        Group(("blocks.2",), (), {"mlp.fc1": 3}, skipped=("attn",)), Group(("blocks.3",), (), skipped=("mlp",)),
    ]  # fmt: skip
    plan = plan_of(teacher, family, groups, (), 3)
    student = randomised(student_of(teacher, plan))
    x = images(teacher)
    with torch.no_grad():
        before = student(x)
        with fading(student, teacher, plan, 0.5) as step:
            step(0.0)
            faded = student(x)
            assert not torch.allclose(faded, before)
            whole = copy.deepcopy(teacher)
            for number, part in ((0, "attn"), (1, "attn"), (2, "attn"), (3, "mlp")):
                block: Any = whole.get_submodule(f"blocks.{number}")
                setattr(block, part, student.get_submodule(f"blocks.{number}.{part}"))
                setattr(block, "norm1" if part == "attn" else "norm2", nn.Identity())
                for name, p in student.get_submodule(f"blocks.{number}").named_parameters():
                    if name.startswith("norm"):
                        block.get_parameter(name).copy_(p)
            for name in ("patch_embed", "norm", "head"):
                setattr(whole, name, student.get_submodule(name))
            whole.cls_token, whole.pos_embed = student.cls_token, student.pos_embed
            for number in (2, 3):
                for name, p in student.get_submodule(f"blocks.{number}").named_parameters():
                    if not name.startswith("mlp.fc1") and name.split(".")[0] in ("mlp", "attn"):
                        whole.get_submodule(f"blocks.{number}").get_parameter(name).copy_(p)
            torch.testing.assert_close(whole(x), faded, rtol=1e-4, atol=1e-5)
            step(0.5)
            torch.testing.assert_close(student(x), before)


@pytest.mark.parametrize("drop_path", [0.0, 0.2])
def test_constants_learn(drop_path: float) -> None:
    teacher = tiny("layer-scale")
    plan = skipping(teacher, {1: ("attn",), 2: ("mlp",), 3: ("attn", "mlp")}, ("heads", "mlp"))
    student = student_of(teacher, plan)
    x = images(teacher, 16)
    blocks = family_of(teacher, "tiny").block_names(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    losses = []
    torch.manual_seed(0)
    with training_student(student, blocks, DistillRecipe(drop_path=drop_path, grad_checkpointing=True)):
        for _ in range(10):
            loss = (student(x) - teacher(x).detach()).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name in ("blocks.1.attn.bias", "blocks.2.mlp.bias", "blocks.3.attn.bias"):
        assert student.get_parameter(name).abs().max() > 0


def test_losses_of_attention_are_left_out_where_a_block_has_none() -> None:
    teacher = tiny()
    plan = skipping(teacher, {1: ("attn",)})
    student, source = (ComparedModel("tiny", m, (3, 32, 32)) for m in (student_of(teacher, plan), teacher))
    matching = match_models(student, source, DistillRecipe())
    assert set(matching.losses) == {"logits", "hidden", "hidden_relation"}
    with pytest.raises(RecipeError, match="have no q, k and v") as error:
        match_models(student, source, DistillRecipe(loss={"logits": 1.0, "attention": 1.0}))
    assert "no attention left" in error.value.hint
    only_mlp = ComparedModel("tiny", student_of(teacher, skipping(teacher, {1: ("mlp",)})), (3, 32, 32))
    assert "attention" in match_models(only_mlp, source, DistillRecipe()).losses


# --- exports


@pytest.mark.parametrize(
    "to",
    [
        "pt2",
        "hf",
        pytest.param("onnx", marks=pytest.mark.skipif(bool(missing_packages("onnx")), reason="no extra onnx")),
    ],
)
def test_exports_compute_the_same(to: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    written(path, "layer-scale")
    out = tmp_path / {"pt2": "m.pt2", "hf": "folder", "onnx": "m.onnx"}[to]
    done = export.export(path, to, out, num_images=3)
    assert done.max_difference <= 1e-5 * done.largest_output


def test_plain_timm_cannot_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    written(path, "vit")
    with pytest.raises(VitcompressError, match="the attention or MLP of some blocks is left out") as error:
        export.export(path, "timm", tmp_path / "t.safetensors", num_images=2)
    assert "--to hf, pt2 and onnx" in error.value.hint


# --- words


def test_everything_that_describes_groups_says_what_is_left_out() -> None:
    teacher = tiny()
    plan = skipping(teacher, {1: ("mlp",), 2: ("attn", "mlp")})
    assert [describe_layers(group) for group in plan.groups] == ["", "no MLP", "no attention, no MLP", ""]
    console = Console(width=200, file=io.StringIO(), record=True)
    print_plan(plan, "tiny", console)
    printed = console.export_text()
    assert "no attention, no MLP" in printed
    report = dataclasses.replace(REPORT, groups=(1,) * 4, made_of=plan.groups)
    for text in (printed, shown(report), to_markdown(report)):
        assert "1 of 4 blocks has no attention: a constant takes its place." in text
        assert "2 of 4 blocks have no MLP: a constant takes its place." in text
    beside = Group(("blocks.0",), (), {"mlp.fc1": 3}, widths=Widths(qk=4), skipped=("mlp",))
    assert describe_layers(beside) == "no MLP, query/key 4 per head, mlp.fc1: rank 3"
