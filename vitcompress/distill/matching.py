"""Choose the losses and where student and teacher are read, before any weight is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import nn

from vitcompress.distill.hooks import ReadPoints, reading_outputs
from vitcompress.distill.losses import LOSSES, Outputs, needs_teacher
from vitcompress.distill.pairing import pair_layers
from vitcompress.distill.small_views import small_views_fault
from vitcompress.errors import RecipeError, first_line, raise_faults
from vitcompress.families.base import Family
from vitcompress.families.outputs import FEATURES, outputs_of, told_outputs
from vitcompress.families.registry import find_family
from vitcompress.families.view_size import half_size, view_size_fault
from vitcompress.recipe import DistillRecipe

_NO_POINTS = ReadPoints()


@dataclass(frozen=True)
class ComparedModel:
    """A student or teacher without its weights.

    Attributes:
        name: the user's name for it.
        model: on the meta device; a student as its plan makes it.
        input_size: (channels, height, width) of its images.
    """

    name: str
    model: nn.Module
    input_size: tuple[int, int, int]


@dataclass(frozen=True)
class Matching:
    """The losses between a student and its teacher, and where both are read.

    Attributes:
        losses: weight of each loss that can be computed, by name.
        student: where the student is read.
        teacher: where the teacher is read; its blocks are in the order of the student's.
        image_size: (height, width) to resize views to for the teacher; None if it takes them as
            they are.
        notes: what the user should know.
    """

    losses: Mapping[str, float]
    student: ReadPoints = _NO_POINTS
    teacher: ReadPoints = _NO_POINTS
    image_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def default_losses(model: nn.Module) -> Mapping[str, float]:
    """Return the default losses for a compressed model: full weight distillation.

    The weights are the paper's, except for `hidden`; they did best of all combinations in
    docs/benchmarks.md.

    Args:
        model: the student.
    """
    losses = {outputs_of(model).loss: 1.0, "hidden": 1.0, "hidden_relation": 0.1}
    family = find_family(model)
    if family and all(family.qkv(model.get_submodule(block)) for block in family.block_names(model)):
        losses["attention"] = 1.0
    return losses


def match_models(student: ComparedModel, teacher: ComparedModel, recipe: DistillRecipe) -> Matching:
    """Choose the losses and where both models are read.

    A teacher whose blocks belong to no known family gives logits only: losses between blocks are
    dropped, with a note.

    Args:
        student: the model that learns.
        teacher: may be the same model.
        recipe: requested losses, layers and relation heads.

    Raises:
        RecipeError: compared tensors differ in shape, or layers do not exist; lists every fault.
    """
    requested = default_losses(student.model) if recipe.loss is None else recipe.loss
    losses = {name: weight for name, weight in requested.items() if weight}
    check_kind(student, losses)
    _check_temperature(student, recipe)
    _check_same_kind(student, teacher)
    block_losses = [name for name in losses if LOSSES[name].compares_blocks]
    fields = {LOSSES[name].reads for name in losses}
    points = _read_points(student, teacher, recipe.layers, fields) if block_losses else None
    student_points, teacher_points = points or (_NO_POINTS, _NO_POINTS)
    student_outputs = _probe(student, student.input_size[1:], student_points, fields)
    teacher_outputs, image_size = _probe_teacher(teacher, student, student_outputs, teacher_points, fields)
    notes = []
    if recipe.small_first:
        reason = view_size_fault(teacher.model, half_size(student.model)) if image_size is None else "its own"
        raise_faults(RecipeError, small_views_fault(reason, recipe, name=teacher.name))
    if image_size is not None:
        notes.append(f"{teacher.name} sees the student's views, resized to {image_size[0]}×{image_size[1]}.")
    if points is not None:
        _check_shapes((student, student_outputs), (teacher, teacher_outputs), losses, recipe.relation_heads)
    elif block_losses:
        losses = {name: weight for name, weight in losses.items() if name not in block_losses}
        kind = outputs_of(teacher.model).loss
        dropped = ", ".join(block_losses)
        notes.append(f"{teacher.name} has no blocks to compare: it gives {kind} only, without the losses {dropped}.")
        if not needs_teacher(losses):
            raise RecipeError(notes[-1], hint=f"Add --loss {next(iter(default_losses(student.model)))}=1.")
    elif recipe.layers is not None:
        raise RecipeError(f"--layers {recipe.layers}: no --loss compares blocks.", hint="Add --loss attention=1.")
    return Matching(losses, student_points, teacher_points, image_size=image_size, notes=tuple(notes))


def check_kind(student: ComparedModel, losses: Mapping[str, float]) -> None:
    """Check that the losses take the student's kind of outputs.

    Raises:
        RecipeError: a loss takes another kind; lists every fault.
    """
    kind = outputs_of(student.model)
    if kind is FEATURES:
        message = f"{student.name} has no classes; its outputs are features."
        hint = "Use --loss features=1, or give the model classes: --model-arg num_classes=N."
    else:
        message = f"the outputs of {student.name} are {kind.noun}."
        hint = f"Use --loss {kind.loss}=1."
    wrong = [name for name in losses if not LOSSES[name].compares_blocks and name not in kind.losses]
    raise_faults(RecipeError, [(f"--loss {name}: {message}", hint) for name in wrong])


def _check_temperature(student: ComparedModel, recipe: DistillRecipe) -> None:
    """Check that the outputs have a temperature, if one is given.

    Raises:
        RecipeError: they have none.
    """
    kind = outputs_of(student.model)
    if recipe.temperature != 1 and not kind.has_temperature:
        raise RecipeError(
            f"--temperature {recipe.temperature:g}: the outputs of {student.name} are {kind.noun}, which have none.",
            hint="Leave it out.",
        )


def _check_same_kind(student: ComparedModel, teacher: ComparedModel) -> None:
    """Check that both models take images of the same channels and give the same kind of outputs.

    A teacher that was not told its kind has the student's, if both have a head.

    Raises:
        RecipeError: they do not.
    """
    if student.input_size[0] != teacher.input_size[0]:
        raise RecipeError(
            f"--teacher {teacher.name} takes {teacher.input_size[0]} channels, {student.name} {student.input_size[0]}.",
            hint=f"Choose a teacher that takes {student.input_size[0]} channels, or pass --teacher-arg "
            f"in_chans={student.input_size[0]}.",
        )
    kind, other = outputs_of(student.model), outputs_of(teacher.model)
    has_head = FEATURES not in (kind, other)
    if kind is other or (has_head and told_outputs(teacher.model) is None):
        return
    raise RecipeError(
        f"--teacher {teacher.name} gives {other.noun}, {student.name} {kind.noun}.",
        hint="Name a teacher of the same kind. With compress, --outputs says what both give."
        if has_head
        else "Name a teacher of the same kind, or remove its head: --teacher-arg num_classes=0.",
    )


def _read_points(
    student: ComparedModel, teacher: ComparedModel, layers: str | None, fields: Set[str]
) -> tuple[ReadPoints, ReadPoints] | None:
    """Return where both models are read, pair by pair; None if one has no known blocks."""
    student_family, teacher_family = find_family(student.model), find_family(teacher.model)
    if student_family is None or teacher_family is None:
        return None
    student_blocks = student_family.block_names(student.model)
    teacher_blocks = teacher_family.block_names(teacher.model)
    stages = [student_family.stage(block) for block in student_blocks]
    pairs = pair_layers(layers, stages, [teacher_family.stage(block) for block in teacher_blocks])
    return (
        _points_at(student, student_family, [student_blocks[number] for number, _ in pairs], fields),
        _points_at(teacher, teacher_family, [teacher_blocks[number] for _, number in pairs], fields),
    )


def _points_at(side: ComparedModel, family: Family, blocks: Sequence[str], fields: Set[str]) -> ReadPoints:
    """Return where a model is read at `blocks`.

    Raises:
        RecipeError: q, k and v of a block are needed and cannot be read.
    """
    if "qkv" not in fields:
        return ReadPoints(tuple(blocks))
    taps = [tuple(tap.inside(block) for tap in family.qkv(side.model.get_submodule(block))) for block in blocks]
    if not all(taps):
        raise RecipeError(
            f"--loss attention: blocks of {side.name} have no q, k and v that can be read.",
            hint="Drop this loss: heads narrowed by --width have other channels than the teacher's, a block may "
            "have no attention left, and some models have other layers.",
        )
    return ReadPoints(tuple(blocks), tuple(taps))


def _probe_teacher(
    teacher: ComparedModel, student: ComparedModel, student_outputs: Outputs, points: ReadPoints, fields: Set[str]
) -> tuple[Outputs, tuple[int, int] | None]:
    """Return the teacher's outputs, and the size to resize views to if it needs another.

    Raises:
        RecipeError: it takes neither that size nor its own, or its outputs have another width.
    """
    for size in (student.input_size[1:], teacher.input_size[1:]):
        try:
            outputs = _probe(teacher, size, points, fields)
        except Exception as error:  # timm asserts, torch raises; either way the model does not take the size
            reason = first_line(error)
            continue
        shape, expected = outputs.logits.shape[1:], student_outputs.logits.shape[1:]
        if shape != expected:
            hint = "Name a teacher with the same classes, or build it with as many: --teacher-arg num_classes=N."
            raise RecipeError(
                f"--teacher {teacher.name} gives {_join(shape)} outputs, {student.name} {_join(expected)}.",
                hint="Name a teacher with as many features." if outputs_of(student.model) is FEATURES else hint,
            )
        return outputs, None if size == student.input_size[1:] else size
    raise RecipeError(f"--teacher {teacher.name} does not take images of its own size {teacher.input_size}: {reason}.")


def _probe(model: ComparedModel, size: tuple[int, int], points: ReadPoints, fields: Set[str]) -> Outputs:
    """Run a model on one image, both on the meta device, for the shapes of its outputs."""
    empty = copy.deepcopy(model.model).to("meta").eval()
    images = torch.empty(1, model.input_size[0], *size, device="meta")
    with torch.no_grad(), reading_outputs(empty, points, fields) as outputs:
        return outputs(empty(images))


def _check_shapes(
    student: tuple[ComparedModel, Outputs],
    teacher: tuple[ComparedModel, Outputs],
    losses: Mapping[str, float],
    heads: int,
) -> None:
    """Check that the compared tensors have shapes that the losses can compare.

    Raises:
        RecipeError: they do not; lists every fault.
    """
    faults: dict[tuple[str, str], None] = {}  # without duplicates: all blocks of a stage are alike
    names = student[0].name, teacher[0].name
    for name in losses:
        field = LOSSES[name].reads
        for shapes in zip(_shapes(student[1], field), _shapes(teacher[1], field), strict=True):
            first, second = shapes if field == "hidden" else (shape[:-1] for shape in shapes)
            if first != second:
                has = f"{names[0]} has {_describe(shapes[0])}, --teacher {names[1]} {_describe(shapes[1])}"
                hint = "Drop this loss; relations need the same number of tokens, hidden also the same width."
                faults[f"--loss {name}: {has}.", hint] = None
            for owner, shape in zip(names, shapes, strict=True):
                if field == "qkv" and shape[-1] % heads:
                    faults[f"--relation-heads {heads}: does not divide the width of {owner}, {shape[-1]}.", ""] = None
    raise_faults(RecipeError, faults)


def _shapes(outputs: Outputs, field: str) -> list[tuple[int, ...]]:
    """Return the shape of each block's value of a field; for q, k and v, the shape of q."""
    values = [q for q, _, _ in outputs.qkv] if field == "qkv" else getattr(outputs, field) if field != "logits" else ()
    return [tuple(value.shape) for value in values]


def _describe(shape: Sequence[int]) -> str:
    windows = f"{shape[0]} windows of " if shape[0] > 1 else ""
    return f"{windows}{_join(shape[1:-1])} tokens of width {shape[-1]}"


def _join(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
