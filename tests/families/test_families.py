"""What holds for the models of every family, one row each; the published sizes of Mini-Swin."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.factories import KINDS, ROWS, VIT_ARGS, Row, build, planned, randomise, row_images, student_of
from vitcompress.artifact.load import load
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.read import read_manifest
from vitcompress.artifact.write import write
from vitcompress.errors import ModelError, PlanError
from vitcompress.families import insertion
from vitcompress.families.base import Family
from vitcompress.families.registry import FAMILIES, family_named, family_of
from vitcompress.initialize.shared_matrices import STARTS
from vitcompress.layers.mixed_attention import mixed_attention
from vitcompress.layers.transforms import KeyPositions, TokenConvolution
from vitcompress.measure.macs import macs_of, with_macs
from vitcompress.plans.model import Plan
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.resolve import Source, resolve
from vitcompress.pretrained.short_names import SHORT_NAMES
from vitcompress.quantize.store import donor_tensors
from vitcompress.recipe import ModelRecipe

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


@every_row
def test_share_1_is_the_teacher(row: Row) -> None:
    teacher, x = build(row), row_images(row)
    assert family_of(teacher, "").name == row.family
    with torch.no_grad():
        expected = teacher(x)
        assert torch.equal(student_of(teacher, planned(teacher, share=1, transforms=()))(x), expected)
        outputs = student_of(teacher, planned(teacher, share=1, transforms=row.transforms))(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def write_student(row: Row, student: nn.Module, plan: Plan, x: torch.Tensor, folder: Path) -> Path:
    """Write a student to a file and return its path."""
    config = {"input_size": tuple(x.shape[1:]), "mean": (0.5,) * x.shape[1], "std": (0.5,) * x.shape[1]}
    manifest = Manifest(
        source={
            "name": row.architecture, "architecture": row.architecture, "model_args": dict(row.args),
            "pretrained_cfg": {},
        },
        source_sha256="", plan=plan, data_config=config, recipe={}, report={}, versions={},
    )  # fmt: skip
    path = folder / "mini.safetensors"
    write(path, student, manifest, x)
    return path


@every_row
def test_plan_student_and_file_agree(row: Row, tmp_path: Path) -> None:
    teacher, x = build(row), row_images(row)
    with torch.device("meta"):
        empty = timm.create_model(row.architecture, **row.args)
    plan = planned(empty, share=2, transforms=row.transforms, share_biases=True, share_tables=True)
    assert plan == planned(teacher, share=2, transforms=row.transforms, share_biases=True, share_tables=True)
    student = student_of(teacher, plan)
    randomise(student)
    student.eval()
    path = write_student(row, student, plan, x, tmp_path)
    stored = load_file(path)
    names = {name for name, _ in student.named_parameters()}
    assert plan.size.student_params == sum(p.numel() for p in student.parameters())
    assert plan.size.student_params == sum(t.numel() for name, t in stored.items() if name in names)
    assert plan.size.student_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert plan.size.student_params < plan.size.teacher_params
    loaded = load(path)
    with torch.no_grad():
        assert torch.equal(loaded(x), student(x))
        assert torch.equal(loaded.forward_features(x), student.forward_features(x))  # type: ignore[operator]
    assert [(n, b.shape) for n, b in loaded.named_buffers()] == [(n, b.shape) for n, b in student.named_buffers()]
    for name, t in donor_tensors(loaded).items():
        assert torch.equal(t, stored[name])


@pytest.mark.broad
@pytest.mark.parametrize("kind", KINDS)
@every_row
def test_every_kind_of_plan_is_what_is_built_and_stored(row: Row, kind: str, tmp_path: Path) -> None:
    """Its parameters, bytes and multiply-accumulates are right, and its file holds the student."""
    teacher, x = build(row), row_images(row)
    with torch.device("meta"):
        empty = timm.create_model(row.architecture, **row.args)
    try:
        plan = planned(empty, **KINDS[kind])
    except PlanError as error:
        assert ("narrow" in kind, "neither a plain MLP" in str(error)) == (True, True)  # noqa: PT017 - only for some rows
        return
    plan = with_macs(plan, empty, (3, *row.image))
    student = student_of(teacher, plan)
    randomise(student)
    student.eval()
    path = write_student(row, student, plan, x, tmp_path)
    stored = load_file(path)
    assert read_manifest(path).plan == plan
    assert plan.size.student_params == sum(p.numel() for p in student.parameters())
    assert plan.size.student_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert plan.size.student_macs == macs_of(student, (3, *row.image))
    loaded = load(path)
    with torch.no_grad():
        assert torch.equal(loaded(x), student(x))
    assert sum(p.numel() for p in loaded.parameters()) == plan.size.student_params
    assert plan.size.student_params < plan.size.teacher_params


@every_row
def test_gradient_of_a_shared_weight_is_the_sum_over_its_blocks(row: Row) -> None:
    teacher, x = build(row, dtype=torch.float64), row_images(row, dtype=torch.float64)
    recipe: dict[str, Any] = {"transforms": row.transforms, "share_biases": True, "share_tables": True}
    plan = planned(teacher, share=4, **recipe)
    student = student_of(teacher, plan)
    apart = student_of(teacher, planned(teacher, share=1, **recipe))
    apart.load_state_dict(student.state_dict())
    for model in (student, apart):
        out = model(x)
        torch.sin(out).sum().backward()
    assert max(len(group.blocks) for group in plan.groups) >= 2
    for group in plan.groups:
        for name in group.shared:
            each_block = [apart.get_parameter(f"{block}.{name}").grad for block in group.blocks]
            expected = torch.stack([g for g in each_block if g is not None]).sum(0)
            grad = student.get_parameter(f"{group.donor}.{name}").grad
            assert grad is not None
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@every_row
def test_blocks_without_head_mixing_keep_their_attention(row: Row) -> None:
    teacher = build(row)
    student = student_of(teacher, planned(teacher, share=2, transforms=("mlp",)))
    kinds = [{n: type(m) for n, m in model.named_modules() if n.endswith("attn")} for model in (teacher, student)]
    assert kinds[0] == kinds[1]


@every_row
def test_every_start_keeps_blocks_that_are_equal_already(row: Row) -> None:
    teacher = build(row)
    plan = planned(teacher, share=4, share_tables=True, transforms=())
    for group in plan.groups:
        donor = teacher.get_submodule(group.donor).state_dict()
        for block in group.blocks[1:]:
            teacher.get_submodule(block).load_state_dict(donor)
    with torch.no_grad():
        expected = teacher(row_images(row))
        for start in STARTS.values():
            student = student_of(teacher, plan)
            start(student, teacher, plan, lambda: [row_images(row)])
            torch.testing.assert_close(
                student(row_images(row)), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
            )
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_family_names_are_unique() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert {row.family for row in ROWS.values()} == {family.name for family in FAMILIES}
    assert all(family_named(family.name) is family for family in FAMILIES)


def test_token_convolution_follows_the_grid_of_the_image() -> None:
    """16×64 pixels have as many patches as 32×32, so only the shape tells the grids apart."""
    for name in ("vit dynamic", "swin dynamic"):
        teacher = build(ROWS[name])
        student = student_of(teacher, planned(teacher, share=2, transforms=("mlp",)))
        copied = copy.deepcopy(student)  # the hooks must be copied too
        for model in (student, copied):
            before = [module.grid_size for module in _convolutions(model)]
            model(row_images(ROWS[name]))
            after = [module.grid_size for module in _convolutions(model)]
            assert all(rows == cols for rows, cols in before)
            assert all(4 * rows == cols for rows, cols in after)


def _convolutions(model: nn.Module) -> list[TokenConvolution]:
    return [module for module in model.modules() if isinstance(module, TokenConvolution)]


def _swin(depth: str, **recipe: Any) -> Plan:
    return planned(empty_model(Source("swin", f"swin_{depth}_patch4_window7_224")), **recipe)


def _unique_blocks(plan: Plan) -> list[int]:
    stages: dict[str, int] = {}
    for group in plan.groups:
        stage = family_named(plan.family).stage(group.donor)
        stages[stage] = stages.get(stage, 0) + 1
    return list(stages.values())


def test_groups_stay_inside_a_stage() -> None:
    assert _unique_blocks(_swin("tiny", share=6)) == [1, 1, 1, 1]
    assert _unique_blocks(_swin("base", share=2)) == [1, 1, 9, 1]
    with pytest.raises(PlanError, match=r"layers\.0\.blocks\.1 and layers\.1\.blocks\.0 are in different stages"):
        _swin("tiny", groups="0,1-2,3-11")


def test_blocks_of_different_shapes_never_share() -> None:
    teacher = build(ROWS["fewer key heads"])
    assert [len(group.blocks) for group in planned(teacher, share=4).groups] == [1, 2, 1]
    with pytest.raises(PlanError, match="matrices of different shapes"):
        planned(teacher, groups="0-1,2-3")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("depth", "share", "params"), [("tiny", 6, 11_767_645), ("small", 2, 25_985_725), ("base", 2, 45_804_804)]
)
def test_mini_swin_has_the_published_parameters(depth: str, share: int, params: int) -> None:
    plan = _swin(depth, share=share, share_biases=True, share_tables=True, transforms=())
    assert plan.size.student_params == params


def test_tables_are_private_unless_asked_for() -> None:
    for name, table in (
        ("swin", "attn.relative_position_bias_table"),
        ("swin v2", "attn.cpb_mlp.2.weight"),
        ("beit", "attn.relative_position_bias_table"),
    ):
        teacher = build(ROWS[name])
        for share_tables in (False, True):
            plan = planned(teacher, share=2, share_tables=share_tables)
            first, second = plan.groups[0].blocks
            student = student_of(teacher, plan)
            tied = student.get_parameter(f"{first}.{table}") is student.get_parameter(f"{second}.{table}")
            assert tied is share_tables


@pytest.mark.parametrize("name", ["swin", "swin v2"])
def test_shifts_alternate_and_masked_places_stay_masked_whatever_the_mix(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = build(ROWS[name])
    student = student_of(teacher, planned(teacher, share=4))
    randomise(student)
    blocks = [student.get_submodule(block) for block in family_of(student, "").block_names(student)]
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mix_logits: Tensor, mix_probs: Tensor, **terms: Any) -> Tensor:
        ones = torch.eye(k.shape[2]).expand(
            *k.shape[:2], -1, -1
        )  # with these values, the outputs are the probabilities
        seen.append(mixed_attention(q, k, ones, mix_logits, None, **terms))
        return mixed_attention(q, k, v, mix_logits, mix_probs, **terms)

    monkeypatch.setattr(insertion, "mixed_attention", attend)
    with torch.no_grad():
        student(row_images(ROWS[name]))
    shifts = [block.shift_size for block in blocks]
    assert shifts == [(0, 0), (2, 2), (0, 0), (2, 2), (0, 0), (2, 2), (0, 0), (0, 0)]
    for block, shift, probs in zip(blocks, shifts, seen, strict=True):
        mask: Any = block.attn_mask
        assert (mask is None) == (shift == (0, 0))
        if mask is None:
            assert probs.min() > 1e-20
        else:  # [images, windows, heads, N, N] against [windows, N, N]
            outside = probs.unflatten(0, (-1, len(mask))).transpose(1, 2)[..., mask < 0]
            assert len(outside)
            assert outside.max() < 1e-20


@pytest.mark.filterwarnings(
    "ignore:.*searchsorted", "ignore:Using a non-tuple sequence"
)  # from timm, on resizing tables
@pytest.mark.parametrize("name", ["swin", "swin v2", "beit"])
def test_a_student_can_still_be_resized(name: str) -> None:
    teacher = build(ROWS[name])
    student = student_of(teacher, planned(teacher, share=1, transforms=("heads", "mlp")))
    for model in (teacher, student):
        model.set_input_size(img_size=(64, 48))  # type: ignore[operator]
    x = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(student(x), teacher(x), rtol=1e-4, atol=1e-4)


@pytest.mark.broad
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # from torch.export
@pytest.mark.parametrize("name", ["swin", "swin v2", "beit", "eva02"])
def test_a_student_exports_for_any_batch(name: str) -> None:
    teacher, x = build(ROWS[name]), row_images(ROWS[name])
    student = student_of(teacher, planned(teacher, share=2))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(student, (x,), dynamic_shapes=({0: batch},))
    many = torch.cat([x, x, x])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(many), student(many), rtol=1e-5, atol=1e-5)


def test_a_model_of_no_family_is_refused_with_the_families() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    with pytest.raises(ModelError, match="resnet18 is a ResNet") as caught:
        family_of(model, "resnet18")
    assert all(family.model_type.__name__ in caught.value.hint for family in FAMILIES)
    assert "docs/how-to/adding-a-family.md" in caught.value.hint


def test_transforms_that_do_not_fit_are_refused_with_a_reason() -> None:
    diff = timm.create_model("vit_tiny_patch16_224", **{**VIT_ARGS, "attn_layer": "diff"})
    with pytest.raises(PlanError, match="DiffAttention, not timm's plain Attention"):
        planned(diff, share=2)
    dropped = timm.create_model("eva02_tiny_patch14_224", **{**VIT_ARGS, "patch_drop_rate": 0.5})
    with pytest.raises(PlanError, match="patch_drop_rate"):
        planned(dropped, share=2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin", "relative position bias of their own"),
        ("swin v2", "relative position bias of their own"),
        ("beit", "relative position bias of its own"),
        ("eva", "for plain ViTs"),
    ],
)
def test_other_families_say_why_they_have_no_position_term(name: str, reason: str) -> None:
    with pytest.raises(PlanError, match=f"--transforms rpe: .*{reason}"):
        planned(build(ROWS[name]), share=2, transforms=("rpe",))


def test_position_term_follows_the_grid_of_the_image() -> None:
    """16×64 pixels have as many patches as 32×32, so only the shape tells the grids apart."""
    student = student_of(build(ROWS["vit dynamic"]), planned(build(ROWS["vit dynamic"]), share=2, transforms=("rpe",)))
    for model in (student, copy.deepcopy(student)):
        model(row_images(ROWS["vit dynamic"]))
        assert [m.grid_size for m in model.modules() if isinstance(m, KeyPositions)] == [(2, 8)] * 4


def test_the_how_to_makes_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in docs/how-to/adding-a-family.md passes the tests of every family."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "adding-a-family.md").read_text(encoding="utf-8")
    fields = {field.name for field in dataclasses.fields(Family)}
    assert fields == set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "Family(" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    family: Family = names["VIT_RELPOS"]
    monkeypatch.setattr("vitcompress.families.registry.FAMILIES", (*FAMILIES, family))
    for architecture in ("vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224"):
        row = Row(family.name, architecture, VIT_ARGS)
        test_share_1_is_the_teacher(row)
        test_gradient_of_a_shared_weight_is_the_sum_over_its_blocks(row)


def test_short_names_are_models_of_known_families() -> None:
    modules = ("vision_transformer", "deit", "swin_transformer", "swin_transformer_v2", "beit", "eva")
    for short, name in SHORT_NAMES.items():
        source = resolve(ModelRecipe(short))
        assert source.architecture == name
        assert timm.models.is_model_in_modules(name.partition(".")[0], modules)
        assert not timm.is_model(short)
