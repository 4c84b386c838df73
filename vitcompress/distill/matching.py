"""What of the student is compared with what of the teacher?  Settled on meta tensors, before any weight is loaded.

--layers 1,3,5:9     student blocks  0 1 2 3 4 5      1 is short for 1:1
                                       │   │   └──────────┐
                     teacher blocks  0 1 2 3 4 5 6 7 8 9 10 11
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcompress.distill.hooks import TokenSubset, as_read, tap_outputs
from vitcompress.distill.losses import LOSSES, QKV, Outputs
from vitcompress.distill.relations import all_tokens
from vitcompress.errors import RecipeError, raise_faults
from vitcompress.families.base import Family, Tap
from vitcompress.families.find import find_family
from vitcompress.families.insertion import layers_called
from vitcompress.families.outputs import has_classes
from vitcompress.recipe import DistillRecipe


@dataclass(frozen=True)
class ComparedModel:
    """A model that may be compared, without its weights.

    Attributes:
        name: what the user calls it.
        model: on the meta device; a student's as its plan makes it.
        input_size: (channels, rows, columns) of its images.
    """

    name: str
    model: nn.Module
    input_size: tuple[int, int, int]


@dataclass(frozen=True)
class Side:
    """Where one of the two models is read.

    Attributes:
        blocks: full names of the compared blocks.
        qkv: for each of them, where q, k and v are read; nothing where they are not compared.
    """

    blocks: tuple[str, ...] = ()
    qkv: tuple[tuple[Tap, ...], ...] = ()


NOTHING = Side()


@dataclass(frozen=True)
class Matching:
    """What is compared.

    Attributes:
        losses: weight of each loss that can be had, by name.
        student: where the student is read.
        teacher: where the teacher is read; its blocks are in the order of the student's.
        image_size: (rows, columns) that views are resized to for the teacher; None where it takes them as they are.
        notes: what the user should know.
    """

    losses: Mapping[str, float]
    student: Side = NOTHING
    teacher: Side = NOTHING
    image_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def default_losses(model: nn.Module) -> Mapping[str, float]:
    """The losses of a model that is compressed, where none are asked for: weight distillation in full.

    The weights are the paper's, and ours for `hidden`; they did best of all combinations: docs/benchmarks.md.

    Args:
        model: the student.
    """
    losses = {"logits" if has_classes(model) else "features": 1.0, "hidden": 1.0, "hidden_relation": 0.1}
    family = find_family(model)
    if family and all(family.qkv(model.get_submodule(block)) for block in family.block_names(model)):
        losses["attention"] = 1.0
    return losses


def match_models(student: ComparedModel, teacher: ComparedModel, recipe: DistillRecipe) -> Matching:
    """Settle what is compared.

    A teacher without transformer blocks that we know gives logits only; losses between blocks are left out then, and a
    note says so.

    Args:
        student: the model that learns.
        teacher: may be the same.
        recipe: losses, layers and relation heads asked for.

    Raises:
        RecipeError: what the losses compare differs in shape, or the layers are not there; every fault at once.
    """
    asked = default_losses(student.model) if recipe.loss is None else recipe.loss
    losses = {name: weight for name, weight in asked.items() if weight}
    check_kind(student, losses)
    _check_alike(student, teacher)
    wanted = [name for name in losses if LOSSES[name].of_blocks]
    ours, theirs = find_family(student.model), find_family(teacher.model)
    fields = {LOSSES[name].reads for name in losses}
    sides = None
    if wanted and ours is not None and theirs is not None:
        sides = _sides((student, ours), (teacher, theirs), recipe.layers, fields)
    side, teachers_side = sides or (NOTHING, NOTHING)
    mine = probe(student, student.input_size[1:], side, fields)
    yours, image_size = _teachers(teacher, student, mine, teachers_side, fields)
    notes = []
    if image_size is not None:
        notes.append(f"{teacher.name} sees the student's views, resized to {image_size[0]}×{image_size[1]}.")
    if sides is not None:
        _check_shapes((student, mine), (teacher, yours), losses, recipe.relation_heads)
        return Matching(losses, *sides, image_size=image_size, notes=tuple(notes))
    if wanted:
        losses = {name: weight for name, weight in losses.items() if name not in wanted}
        kind = "logits" if has_classes(teacher.model) else "features"
        left_out = ", ".join(wanted)
        notes.append(f"{teacher.name} has no blocks to compare: it gives {kind} only, without the losses {left_out}.")
    if recipe.layers is not None and not wanted:
        raise RecipeError(f"--layers {recipe.layers}: no --loss compares blocks.", hint="Add --loss attention=1.")
    if not any(LOSSES[name].teacher for name in losses) and wanted:
        raise RecipeError(notes[-1], hint=f"Add --loss {next(iter(default_losses(student.model)))}=1.")
    return Matching(losses, image_size=image_size, notes=tuple(notes))


def check_kind(student: ComparedModel, losses: Mapping[str, float]) -> None:
    """Make sure that the losses read the student's outputs as what they are: logits, or features.

    Raises:
        RecipeError: a loss reads them as the other; every fault at once.
    """
    if has_classes(student.model):
        wrong, message = {"features"}, f"the outputs of {student.name} are logits of classes."
        hint = "Use --loss logits=1."
    else:
        wrong, message = {"logits", "labels"}, f"{student.name} has no classes; its outputs are features."
        hint = "Use --loss features=1, or give the model classes: --model-arg num_classes=N."
    raise_faults(RecipeError, [(f"--loss {name}: {message}", hint) for name in losses if name in wrong])


def pair_layers(text: str | None, ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """Which block of the student learns from which of the teacher.

    Args:
        text: `1,3,5:9`, student block and teacher block, counted from 0; None for every block.
        ours: the stage of each of the student's blocks.
        theirs: the stage of each of the teacher's.

    Returns:
        Pairs of numbers, in the order of `text` or of the student's blocks.

    Raises:
        RecipeError: not of that form, or a block that is not there; every fault at once.

    Source: without `text`, the k-th of n blocks learns from the last of the m·k/n it stands for, stage by stage, as in
        MiniViT's scripts: of Swin-T's 12 blocks 1, 3, 5, 7, 9, 11 from 1, 3, 9, 15, 21, 23 of a teacher's 24.
    """
    if text is None:
        return _spread(ours, theirs)
    faults: list[str] = []
    pairs: list[tuple[int, int]] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", part)
        if found is None:
            faults.append(f"{part.strip()!r} is not of the form STUDENT or STUDENT:TEACHER")
            continue
        pair = int(found[1]), int(found[2] or found[1])
        for number, stages, who in zip(pair, (ours, theirs), ("student", "teacher"), strict=True):
            if number >= len(stages):
                faults.append(f"{part.strip()} goes past the {who}'s last block, {len(stages) - 1}")
        if pair[0] in [first for first, _ in pairs]:
            faults.append(f"student block {pair[0]} comes twice")
        pairs.append(pair)
    raise_faults(
        RecipeError, [(f"--layers {text}: {fault}.", "Blocks count from 0, as in 1:1,3:9.") for fault in faults]
    )
    return pairs


def _spread(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    if list(dict.fromkeys(ours)) != list(dict.fromkeys(theirs)):  # other stages: as if there were none
        ours, theirs = [""] * len(ours), [""] * len(theirs)
    pairs = []
    for stage in dict.fromkeys(ours):
        mine = [number for number, other in enumerate(ours) if other == stage]
        yours = [number for number, other in enumerate(theirs) if other == stage]
        pairs += [
            (block, yours[-(-(k + 1) * len(yours) // len(mine)) - 1])  # rounded up, so that none comes before the first
            for k, block in enumerate(mine)
        ]
    return pairs


@contextmanager
def reading(
    model: nn.Module, side: Side, fields: Set[str], tokens: TokenSubset | None = None
) -> Iterator[Callable[[Tensor], Outputs]]:
    """Read a model's forward passes until the context ends.

    Each is handed out once, and not held on to: a teacher's values are free before the student's backward pass.

    Args:
        model: the model of `side`.
        side: where it is read.
        fields: of `Outputs`; nothing else is read.
        tokens: which tokens relations are made of; None for all.

    Yields:
        A function from the logits of the last forward pass to its `Outputs`.
    """
    blocks = [Tap(name) for name in side.blocks]
    keep = tokens or as_read
    with ExitStack() as stack:
        if "qkv" in fields:
            stack.enter_context(layers_called(model))

        def values(field: str, taps: Sequence[Tap], keep: Callable[[Tensor], Tensor] = as_read) -> list[Tensor]:
            return stack.enter_context(tap_outputs(model, taps, keep)) if field in fields else []

        hidden = values("hidden", blocks)
        sampled = values("sampled", blocks, lambda states: keep(states.flatten(1, -2)))
        qkv = values("qkv", [tap for taps in side.qkv for tap in taps], keep)

        def hand_out(logits: Tensor) -> Outputs:
            choose = tokens.choose if tokens else all_tokens
            found = Outputs(logits, list(hidden), list(sampled), _triples(qkv, side), choose)
            for read in (hidden, sampled, qkv):
                read.clear()
            return found

        yield hand_out


def _triples(values: Sequence[Tensor], side: Side) -> list[QKV]:
    """What the taps gave, as q, k and v of each block."""
    found, rest = [], iter(values)
    for taps in side.qkv if values else ():
        parts = [next(rest) for _ in taps]
        q, k, v = parts if len(parts) > 1 else parts[0].chunk(3, dim=-1)
        found.append((q, k, v))
    return found


def _sides(
    ours: tuple[ComparedModel, Family], theirs: tuple[ComparedModel, Family], layers: str | None, fields: Set[str]
) -> tuple[Side, Side]:
    """Where student and teacher are read, pair by pair."""
    names = [family.block_names(candidate.model) for candidate, family in (ours, theirs)]
    stages = [[ours[1].stage(name) for name in names[0]], [theirs[1].stage(name) for name in names[1]]]
    pairs = pair_layers(layers, *stages)
    sides = []
    for which, (candidate, family) in enumerate((ours, theirs)):
        blocks = tuple(names[which][pair[which]] for pair in pairs)
        qkv = [family.qkv(candidate.model.get_submodule(block)) for block in blocks] if "qkv" in fields else []
        if not all(qkv):
            raise RecipeError(
                f"--loss attention: blocks of {candidate.name} have no q, k and v that can be read.",
                hint="Leave it out of the losses: heads that --width made narrow have other channels than the "
                "teacher's, and some models other layers.",
            )
        full = (tuple(tap.inside(block) for tap in taps) for block, taps in zip(blocks, qkv, strict=False))
        sides.append(Side(blocks, tuple(full)))
    return sides[0], sides[1]


def _check_alike(student: ComparedModel, teacher: ComparedModel) -> None:
    """Make sure that both take images of the same channels, and give outputs of the same kind.

    Raises:
        RecipeError: they do not.
    """
    if student.input_size[0] != teacher.input_size[0]:
        raise RecipeError(
            f"--teacher {teacher.name} takes {teacher.input_size[0]} channels, {student.name} {student.input_size[0]}.",
            hint="Name a teacher of as many, or build it with them: --teacher-arg in_chans=N.",
        )
    if has_classes(student.model) != has_classes(teacher.model):
        kinds = ["logits of classes" if has_classes(side.model) else "features" for side in (teacher, student)]
        raise RecipeError(
            f"--teacher {teacher.name} gives {kinds[0]}, {student.name} {kinds[1]}.",
            hint="Name a teacher of the same kind, or build it so: --teacher-arg num_classes=0 is without a head.",
        )


def _teachers(
    teacher: ComparedModel, student: ComparedModel, mine: Outputs, side: Side, fields: Set[str]
) -> tuple[Outputs, tuple[int, int] | None]:
    """What the teacher gives, and the size to resize views to for it; None where it takes the student's.

    Raises:
        RecipeError: it takes neither those nor images of its own size, or its outputs are others.
    """
    for size in (student.input_size[1:], teacher.input_size[1:]):
        try:
            yours = probe(teacher, size, side, fields)
        except Exception as error:  # timm asserts, torch raises; either way the model does not take the size
            reason = str(error).strip().splitlines()[:1]
            continue
        found, wanted = (outputs.logits.shape[1:] for outputs in (yours, mine))
        if found != wanted:
            hint = "Name a teacher of the same classes, or build it with them: --teacher-arg num_classes=N."
            raise RecipeError(
                f"--teacher {teacher.name} gives {_count(found)} outputs, {student.name} {_count(wanted)}.",
                hint=hint if has_classes(student.model) else "Name a teacher of as many features.",
            )
        return yours, None if size == student.input_size[1:] else size
    raise RecipeError(f"--teacher {teacher.name} takes no images of its own size {teacher.input_size}: {reason}.")


def _count(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def probe(
    candidate: ComparedModel, size: tuple[int, int], side: Side = NOTHING, fields: Set[str] = frozenset()
) -> Outputs:
    """Run a model without weights on one image without pixels: the shapes of what it gives are real."""
    model = copy.deepcopy(candidate.model).to("meta").eval()
    images = torch.empty(1, candidate.input_size[0], *size, device="meta")
    with torch.no_grad(), reading(model, side, fields) as outputs:
        return outputs(model(images))


def _check_shapes(
    ours: tuple[ComparedModel, Outputs], theirs: tuple[ComparedModel, Outputs], losses: Mapping[str, float], heads: int
) -> None:
    """Make sure that what the losses compare can be compared.

    Raises:
        RecipeError: it cannot; every fault at once.
    """
    (student, of_student), (teacher, of_teacher) = ours, theirs
    faults: dict[tuple[str, str], None] = {}  # each once: all blocks of a stage are alike
    for name in losses:
        field = LOSSES[name].reads
        for mine, yours in zip(_shapes(of_student, field), _shapes(of_teacher, field), strict=True):
            if mine != yours if field == "hidden" else mine[:-1] != yours[:-1]:
                message = f"--loss {name}: {student.name} has {_show(mine)}, --teacher {teacher.name} {_show(yours)}."
                faults[message, "Leave it out of the losses; relations need as many tokens, hidden also the width."] = (
                    None
                )
            for candidate, width in ((student, mine[-1]), (teacher, yours[-1])):
                if field == "qkv" and width % heads:
                    message = f"--relation-heads {heads}: does not divide the width of {candidate.name}, {width}."
                    faults[message, ""] = None
    raise_faults(RecipeError, faults)


def _shapes(outputs: Outputs, field: str) -> list[tuple[int, ...]]:
    """Of each block; of q where there are q, k and v."""
    values = [q for q, _, _ in outputs.qkv] if field == "qkv" else getattr(outputs, field) if field != "logits" else ()
    return [tuple(value.shape) for value in values]


def _show(shape: Sequence[int]) -> str:
    windows = f"{shape[0]} windows of " if shape[0] > 1 else ""
    return f"{windows}{'×'.join(map(str, shape[1:-1]))} tokens of width {shape[-1]}"
