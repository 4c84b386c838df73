from typing import Any

import pytest
import timm
import torch

from tests.factories import ROWS, VARIANTS, Row, build, compressed, images, row_images, tiny
from vitcompress.distill.hooks import ReadPoints, TokenSubset, reading_outputs, tap_outputs
from vitcompress.distill.losses import LOSSES, LossContext
from vitcompress.distill.matching import ComparedModel, match_models
from vitcompress.distill.student import compiling, training_student
from vitcompress.families.base import Tap, tap_qkv
from vitcompress.families.insertion import layers_called
from vitcompress.families.registry import FAMILIES, family_of
from vitcompress.recipe import DistillRecipe

BLOCKS = [f"blocks.{i}" for i in range(4)]
TAPS = [Tap(name) for name in BLOCKS]


def test_taps_see_each_pass_anew_and_leave() -> None:
    model = tiny()
    x = images(model)
    with tap_outputs(model, TAPS) as seen:
        model(x)
        model(x)
        assert len(seen) == 4
        torch.testing.assert_close(model.forward_head(model.norm(seen[-1])), model(x))  # type: ignore[operator]
    assert not model._forward_pre_hooks
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("default")  # warnings inside torch.compile
def test_blocks_that_are_alike_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend=count))
    model = tiny(depth=12)
    names = [f"blocks.{i}" for i in range(12)]
    with tap_outputs(model, [Tap(name) for name in names]) as seen, compiling(model, names):
        for _ in range(2):
            model(images(model))
            assert len(seen) == 12
    assert 0 < len(graphs) <= 4


def test_taps_come_in_the_order_asked_for_and_as_often() -> None:
    model = tiny()
    with tap_outputs(model, [TAPS[2], TAPS[0], TAPS[2]], lambda value: value[:, :1]) as seen:
        model(images(model))
        assert [tuple(value.shape) for value in seen] == [(2, 1, 24)] * 3
        assert torch.equal(seen[0], seen[2])
        assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_queries_keys_and_values_are_those_of_the_attention(variant: str) -> None:
    """Attention computed from the tapped values equals the attention's output."""
    model = tiny(variant)
    block = model.get_submodule("blocks.1")
    (tap,) = family_of(model, variant).qkv(block)
    attn: Any = block.attn
    with tap_outputs(model, [tap.inside("blocks.1"), Tap("blocks.1.attn")]) as seen:
        model(images(model))
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in seen[0].chunk(3, dim=-1))
    probs = (attn.q_norm(q) @ attn.k_norm(k).mT * attn.scale).softmax(-1)
    torch.testing.assert_close(attn.proj(attn.norm((probs @ v).transpose(1, 2).flatten(2))), seen[1])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_what_is_read_is_what_the_layers_give_in_every_family(row: Row, mixed: bool) -> None:
    """Computed again from the attention's input, its weights and its biases."""
    model = build(row)
    if mixed:
        model, _ = compressed(model, share=2, transforms=("heads",))
    family = family_of(model, row.architecture)
    for block in family.block_names(model)[::3]:
        attn: Any = model.get_submodule(block).attn
        taps = [tap.inside(block) for tap in family.qkv(model.get_submodule(block))]
        if not taps:
            assert attn.q_proj.out_features != attn.k_proj.out_features
            continue
        inputs: list[torch.Tensor] = []
        handle = attn.register_forward_pre_hook(lambda module, given, seen=inputs: seen.append(given[0]))
        with torch.no_grad(), layers_called(model), tap_outputs(model, taps) as found:
            model(row_images(row))
            read = torch.cat(found, dim=-1)
            if len(taps) == 3:
                expected = torch.cat([getattr(attn, name)(inputs[0]) for name in ("q_proj", "k_proj", "v_proj")], -1)
            else:
                bare = getattr(attn, "q_bias", None) is not None
                bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) if bare else attn.qkv.bias
                expected = torch.nn.functional.linear(inputs[0], attn.qkv.weight, bias)
        handle.remove()
        torch.testing.assert_close(read, expected)


@pytest.mark.parametrize("name", ["vit", "swin", "swin v2", "beit", "eva02", "eva02 split", "dinov3"])
def test_losses_of_every_family_have_the_same_gradients_checkpointed(name: str) -> None:
    row = ROWS[name]
    teacher = build(row)
    recipe = DistillRecipe(loss=dict.fromkeys(("hidden", "attention", "hidden_relation"), 1.0))
    candidate = ComparedModel(name, teacher, (3, *row.image))
    asked = match_models(candidate, candidate, recipe)
    fields, choose = {"hidden", "qkv", "sampled"}, TokenSubset(9, seed=0)
    blocks = family_of(teacher, name).block_names(teacher)
    gradients = []
    for checkpointing in (False, True):
        student, _ = compressed(teacher, share=2)
        training = DistillRecipe(grad_checkpointing=checkpointing, drop_path=0.2)
        with (
            training_student(student, blocks, training),
            reading_outputs(student, asked.student, fields, choose) as mine,
            reading_outputs(teacher, asked.teacher, fields, choose) as yours,
        ):
            torch.manual_seed(0)  # for drop path
            with torch.no_grad():
                target = yours(teacher(row_images(row)))
            found = mine(student(row_images(row)))
            terms = [LOSSES[loss].compute(found, target, LossContext()) for loss in recipe.loss or ()]
            torch.stack(terms).sum().backward()
        assert all(term.item() > 0 for term in terms)
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for leaf, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][leaf], gradient, msg=leaf)


def test_a_block_without_queries_has_no_taps() -> None:
    assert all(family.qkv(torch.nn.Linear(2, 2)) == () for family in FAMILIES)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_taps_survive_checkpointing(checkpointing: bool) -> None:
    student, _ = compressed(tiny(), share=2)
    choose = TokenSubset(5, seed=0)
    recipe = DistillRecipe(grad_checkpointing=checkpointing)
    taps = [*TAPS, *(Tap(f"{name}.attn.qkv") for name in BLOCKS)]
    with training_student(student, BLOCKS, recipe), tap_outputs(student, taps, choose) as seen:
        logits = student(images(student, 3))
        kept = list(seen)
        torch.stack([logits.square().sum(), *(value.square().sum() for value in seen)]).sum().backward()
        assert all(now is then for now, then in zip(seen, kept, strict=True))  # not values of the second run
    gradients = {name: p.grad for name, p in student.named_parameters()}
    reference, _ = compressed(tiny(), share=2)
    with tap_outputs(reference, taps, choose) as seen:
        logits = reference(images(student, 3))
        torch.stack([logits.square().sum(), *(value.square().sum() for value in seen)]).sum().backward()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, msg=name)


def test_tokens_are_the_same_for_both_sides_and_others_each_step() -> None:
    choose, again = TokenSubset(6, seed=3), TokenSubset(6, seed=3)
    x = torch.arange(40.0).expand(2, 40).unsqueeze(-1)
    steps = []
    for step in range(3):
        choose.draw(step)
        again.draw(step)
        steps.append(choose(x)[0, :, 0].tolist())
        assert choose(x + 1)[0, :, 0].tolist() == [value + 1 for value in steps[-1]]
        assert torch.equal(choose(x), again(x))
        assert sorted(set(steps[-1])) == steps[-1]
        assert len(steps[-1]) == 6
    assert len({tuple(step) for step in steps}) == 3
    assert TokenSubset(6, seed=4)(x).tolist() != TokenSubset(6, seed=3)(x).tolist()


def test_few_tokens_are_left_whole() -> None:
    x = torch.randn(2, 6, 3)
    assert TokenSubset(6, seed=0)(x) is x


def test_what_autograd_has_anyway_is_not_copied() -> None:
    choose = TokenSubset(6, seed=0)
    few, many = torch.randn(2, 7, 3, requires_grad=True), torch.randn(2, 12, 3, requires_grad=True)
    assert choose(few) is few
    numbers = choose.choose(7, few.device)
    assert numbers is not None
    assert torch.equal(choose(few.detach()), few[:, numbers])
    assert choose(many).shape == (2, 6, 3)


def test_outputs_of_a_teacher_in_inference_mode_can_be_learned_from() -> None:
    """The chosen tokens are not an inference tensor, even if the teacher runs first."""
    teacher = tiny()
    student, _ = compressed(teacher, share=2)
    candidate = ComparedModel("tiny", teacher, (3, 32, 32))
    recipe = DistillRecipe(loss=dict.fromkeys(("logits", "hidden", "attention", "hidden_relation"), 1.0))
    asked = match_models(candidate, candidate, recipe)
    gradients = []
    for mode in (torch.inference_mode, torch.no_grad):
        tokens = TokenSubset(16, seed=0)
        fields = {"hidden", "qkv", "sampled"}
        with (
            reading_outputs(student, asked.student, fields, tokens) as mine,
            reading_outputs(teacher, asked.teacher, fields, tokens) as yours,
        ):
            with mode():
                target = yours(teacher(images(teacher)))
            found = mine(student(images(teacher)))
            student.zero_grad()
            torch.stack(
                [LOSSES[loss].compute(found, target, LossContext()) for loss in recipe.loss or ()]
            ).sum().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradients[1][name], gradient)  # type: ignore[arg-type]


def test_every_token_has_its_turn() -> None:
    choose = TokenSubset(8, seed=0)
    x = torch.arange(16.0).view(1, 16, 1)
    count = torch.zeros(16)
    for step in range(400):
        choose.draw(step)
        count[choose(x).flatten().long()] += 1
    assert count.sum() == 3200
    assert (count - 200).abs().max() < 50  # five standard deviations of a fair draw


def test_reading_gives_what_is_asked_for_and_no_more() -> None:
    model = tiny()
    points = ReadPoints(("blocks.0", "blocks.3"), ((Tap("blocks.0.attn.qkv"),), (Tap("blocks.3.attn.qkv"),)))
    x = images(model)
    with reading_outputs(model, points, {"sampled", "qkv"}, TokenSubset(2, seed=0)) as outputs:
        found = outputs(model(x))
        assert outputs(found.logits).qkv == []  # handed out once
    assert found.hidden == []
    assert [tuple(t.shape) for t in found.sampled] == [(2, 2, 24)] * 2
    assert [tuple(t.shape) for qkv in found.qkv for t in qkv] == [(2, 2, 24)] * 6
    assert torch.equal(found.logits, model(x))


def test_windows_are_images_of_their_own_and_grids_are_tokens() -> None:
    """Swin returns [B, rows, columns, C]; its attention sees [B·windows, tokens of a window, C]."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=(2, 2),
        num_heads=(2, 4), num_classes=5,
    ).eval()  # fmt: skip
    blocks = [f"layers.{stage}.blocks.{number}" for stage in range(2) for number in range(2)]
    qkv = tuple(tuple(tap.inside(block) for tap in tap_qkv(model.get_submodule(block))) for block in blocks)
    points = ReadPoints(tuple(blocks), qkv)
    x = torch.randn(3, 3, 32, 32)
    with reading_outputs(model, points, {"sampled", "hidden", "qkv"}, TokenSubset(20, seed=0)) as outputs:
        found = outputs(model(x))
    assert [tuple(t.shape) for t in found.hidden] == [(3, 16, 16, 12)] * 2 + [(3, 8, 8, 24)] * 2
    assert [tuple(t.shape) for t in found.sampled] == [(3, 20, 12)] * 2 + [(3, 20, 24)] * 2
    assert [tuple(q.shape) for q, _, _ in found.qkv] == [(3 * 16, 16, 12)] * 2 + [(3 * 4, 16, 24)] * 2
    context = LossContext()
    for name in ("hidden", "attention", "hidden_relation"):
        assert LOSSES[name].compute(found, found, context).item() == pytest.approx(0, abs=1e-6)
