"""The context computes what a cut student does; the teacher's layers see its stream."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.factories import ROWS, build
from tests.search.factories import lively, noise, num_params, shapes_of
from vitcompress.families.insertion import layers_called
from vitcompress.families.narrow import full_widths
from vitcompress.initialize.inputs import Call, recording
from vitcompress.plans.make import layer_shapes
from vitcompress.recipe import KINDS
from vitcompress.search.context import WIDTHS, Context, make_context, students_of
from vitcompress.search.divergence import divergence
from vitcompress.search.measure import measure_options
from vitcompress.search.options import PARTS, Option, Shapes, list_options, merge
from vitcompress.search.student import build_student

SINGLE = ("narrow", "low_rank", "skip")
NAMES = ["vit", "deit3", "dinov2 swiglu", "swin", "beit", "eva02"]


@dataclass(frozen=True)
class Case:
    """A teacher, a context, and the context's student, built as any student is."""

    shapes: Shapes
    width: float
    options: list[Option]
    context: Context
    student: nn.Module
    fitted: Tensor
    judged: Tensor

    @property
    def teacher(self) -> nn.Module:
        return self.shapes.model

    @property
    def parts(self) -> list[str]:
        return [f"{block}.{part}" for block in self.shapes.blocks for part in PARTS]

    def layers(self, part: str) -> list[str]:
        block, _, name = part.rpartition(".")
        found = layer_shapes(self.shapes.family, self.teacher.get_submodule(block))
        return [f"{block}.{layer}" for layer in found if layer.startswith(f"{name}.")]


def student_of(shapes: Shapes, options: list[Option], fitted: Tensor) -> nn.Module:
    by_block: dict[str, list[Option]] = {block: [shapes.keep([block])] for block in shapes.blocks}
    for option in options:
        by_block[option.group.donor].append(option)
    return build_student(shapes.plan(map(merge, by_block.values())), shapes.model, fitted)


def case_of(teacher: nn.Module, kinds: tuple[str, ...] = SINGLE, size: int = 32, number: int = 0) -> Case:
    shapes, x = shapes_of(teacher, kinds), noise(16, size)
    fitted, judged, options = x[:12], x[12:], list_options(shapes)
    chosen = [options[n] for n in students_of(shapes, options)[number]]
    context = make_context(shapes, chosen, fitted, judged)
    return Case(shapes, WIDTHS[number], chosen, context, student_of(shapes, chosen, fitted), fitted, judged)


@pytest.fixture(scope="module", params=[*((name, 0) for name in NAMES), ("vit", 1), ("swin", 1)], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    name, number = request.param
    return case_of(build(ROWS[name]), size=ROWS[name].image[0], number=number)


def run(model: nn.Module, names: list[str], x: Tensor) -> tuple[Tensor, dict[str, Call]]:
    """The outputs, and one call of each module, with gradients."""
    calls: dict[str, Call] = {}
    with torch.enable_grad(), layers_called(model), recording(model, names, calls.__setitem__):
        outputs: Tensor = model(x)
    return outputs, calls


def test_the_context_computes_what_its_student_does(case: Case) -> None:
    assert case.options
    with torch.no_grad():
        outputs, expected, whole = (m(case.judged) for m in (case.context.model, case.student, case.teacher))
    assert torch.equal(outputs, expected)
    assert not torch.allclose(outputs, whole)
    assert case.context.nats == divergence(case.student, case.teacher, case.judged) > 0
    assert case.context.params == num_params(case.student) < num_params(case.teacher)


def test_the_teachers_layers_see_the_students_stream(case: Case) -> None:
    layers = [layer for part in case.parts for layer in case.layers(part)]
    _, found = run(case.context.model, layers, case.judged)
    _, stream = run(case.student, case.parts, case.judged)
    _, whole = run(case.teacher, case.parts, case.judged)
    for part in case.parts:
        given = stream[part]
        _, expected = _run_part(case, part, given.input)
        for layer in case.layers(part):
            torch.testing.assert_close(found[layer].input, expected[layer].input)
            torch.testing.assert_close(found[layer].output, expected[layer].output)
    last = case.parts[-1]  # the first part sees the same stream in both
    assert not torch.allclose(stream[last].input, whole[last].input)


def _run_part(case: Case, part: str, x: Tensor) -> tuple[Tensor, dict[str, Call]]:
    """Run a part of the teacher on a stream."""
    _, calls = run(case.student, [part], case.judged)
    module: Any = case.teacher.get_submodule(part)
    names, found = case.layers(part), dict[str, Call]()
    with torch.enable_grad(), layers_called(module), recording(case.teacher, names, found.__setitem__):
        outputs: Tensor = module(x, *calls[part].args[1:], **calls[part].kwargs)
    return outputs, found


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.square().sum()


def test_nothing_flows_back_through_the_teachers_parts(case: Case) -> None:
    gradients = []
    for model in (case.context.model, case.student):
        x = case.judged.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss_of(model(x)), x)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[1].norm() > 0


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_the_teachers_layers_get_the_gradients_of_the_students_parts(frozen: bool, case: Case) -> None:
    layers = [layer for part in case.parts for layer in case.layers(part)]
    x = case.judged.clone().requires_grad_()
    case.context.model.requires_grad_(not frozen)
    outputs, calls = run(case.context.model, layers, x)
    found = dict(zip(layers, torch.autograd.grad(loss_of(outputs), [calls[n].output for n in layers]), strict=True))
    case.context.model.requires_grad_()
    outputs, parts = run(case.student, case.parts, x)
    gradients = torch.autograd.grad(loss_of(outputs), [parts[name].output for name in case.parts])
    for part, gradient in zip(case.parts, gradients, strict=True):
        assert gradient.norm() > 0
        written, inner = _run_part(case, part, parts[part].input.detach().requires_grad_())
        names = case.layers(part)
        expected = torch.autograd.grad(written, [inner[name].output for name in names], gradient)
        for name, one in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def test_each_part_is_narrow_or_where_it_cannot_be_of_low_rank_and_about_as_wide_as_asked(case: Case) -> None:
    by_block: dict[str, list[Option]] = defaultdict(list)
    for option in case.options:
        by_block[option.group.donor].append(option)
    every = list_options(case.shapes)
    assert by_block.keys() == set(case.shapes.blocks)
    for block, options in by_block.items():
        full = full_widths(case.teacher.get_submodule(block), case.shapes.family.narrow_attention)
        attention = {"attn.qk", "attn.v"} if full.qk else {"attn.rank"}
        mlp = {"mlp.hidden"} if full.hidden else {"mlp.rank"}
        assert sorted(option.scale for option in options) == sorted(attention | mlp)
        for option in options:
            alike = [o for o in every if (o.scale, o.group.blocks) == (option.scale, (block,))]
            assert option in alike
            dials = [o.dial for o in alike]
            share = option.dial / (min(dials) + max(dials))
            assert 0.6 * case.width <= share <= 1.6 * case.width or len(dials) < 4


def test_attention_that_cannot_be_narrow_is_of_low_rank() -> None:
    swin, vit = (case_of(build(ROWS[name]), size=ROWS[name].image[0]) for name in ("swin", "vit"))
    for case, expected in ((swin, {"attn.rank", "mlp.hidden"}), (vit, {"attn.qk", "attn.v", "mlp.hidden"})):
        assert {option.scale for option in case.options} == expected


def test_without_narrow_parts_all_are_of_low_rank() -> None:
    case = case_of(lively(), ("low_rank", "skip"))
    assert {option.scale for option in case.options} == {"attn.rank", "mlp.rank"}
    assert len(case.options) == 2 * len(case.shapes.blocks)


@pytest.mark.parametrize("kinds", [("skip",), ("share", "adapter", "basis")])
def test_other_kinds_are_measured_in_the_teacher_itself(kinds: tuple[str, ...]) -> None:
    teacher = lively()
    shapes = shapes_of(teacher, kinds)
    assert students_of(shapes, list_options(shapes)) == [()]
    assert make_context(shapes, [], noise(4), noise(4)) == Context(teacher, num_params(teacher), 0.0)


def test_students_that_come_out_alike_are_one() -> None:
    shapes = shapes_of(lively(), ("narrow",), multiple=1000)
    options = [option for option in list_options(shapes) if option.dial == 4]
    assert len(students_of(shapes, options)) == 1


def test_the_teacher_is_left_alone() -> None:
    teacher, x = lively(), noise(4)
    before, outputs = copy.deepcopy(teacher.state_dict()), teacher(x)
    names = [name for name, _ in teacher.named_modules()]
    context = case_of(teacher, KINDS).context
    context.model(x)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert torch.equal(teacher(x), outputs)
    assert [name for name, _ in teacher.named_modules()] == names == [n for n, _ in context.model.named_modules()]
    assert all("forward" not in vars(module) for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    own = {p.data_ptr() for p in teacher.parameters()}
    assert not own & {p.data_ptr() for p in context.model.parameters()}


@pytest.mark.parametrize("kinds", [("narrow",), ("narrow", "low_rank", "skip")])
def test_the_multiple_makes_the_contexts_options_cost_what_its_student_does(kinds: tuple[str, ...]) -> None:
    """Fitted to half of the images that students are fitted to, and measured on all others."""
    shapes, x = shapes_of(lively(embed_dim=48), kinds), noise(37)
    measured = measure_options(shapes, x[:25], x[25:], 1e9, lambda done: None)
    options = list_options(shapes)
    assert [o.group for o in measured.options] == [o.group for o in options]
    students = students_of(shapes, options)
    assert len(students) == len(measured.levels) == 2
    for number, (level, numbers) in enumerate(zip(measured.levels, students, strict=True)):
        student = student_of(shapes, [options[n] for n in numbers], x[:13])
        total = sum(level.nats[n] for n in numbers)
        judged = x[13:][torch.randperm(24, generator=torch.Generator().manual_seed(0))][number::2]
        assert level.joint * total == pytest.approx(divergence(student, shapes.model, judged), rel=1e-6)
        assert level.joint != 1
        assert level.params == num_params(student)
