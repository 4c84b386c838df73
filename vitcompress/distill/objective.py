"""Compute the weighted losses of a batch from the forward passes of student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from vitcompress.distill.hooks import TokenSubset, reading_outputs
from vitcompress.distill.losses import LOSSES, LossContext, Outputs, needs_teacher
from vitcompress.distill.settings import TrainSettings
from vitcompress.families.outputs import outputs_of

Objective = Callable[[nn.Module, Tensor, Tensor | None, int], Mapping[str, Tensor]]


@contextmanager
def weighted_losses(student: nn.Module, teacher: nn.Module | None, settings: TrainSettings) -> Iterator[Objective]:
    """Read both models until the context ends.

    Args:
        student: not wrapped by accelerate.
        teacher: in eval mode; runs only if a loss needs it. None if no loss does.
        settings: the losses, where the models are read, and tokens.

    Yields:
        A function `(model, images, targets, step) -> weighted losses by name`; `model` is the
        student, bare or as accelerate wraps it.
    """
    recipe, matching = settings.recipe, settings.matching
    fields = {LOSSES[name].reads for name in matching.losses}
    kind = outputs_of(student)
    if not needs_teacher(matching.losses):
        teacher = None
    tokens = TokenSubset(recipe.max_relation_tokens, seed=settings.seed)
    with ExitStack() as stack:
        read_student = stack.enter_context(reading_outputs(student, matching.student, fields, tokens))
        if teacher is not None:
            read_teacher = stack.enter_context(reading_outputs(teacher, matching.teacher, fields, tokens))

        def compute(model: nn.Module, images: Tensor, targets: Tensor | None, step: int) -> dict[str, Tensor]:
            tokens.draw(step)
            with torch.inference_mode():
                expected = Outputs(torch.empty(0)) if teacher is None else read_teacher(teacher(images))
            outputs = read_student(model(images))
            context = LossContext(recipe.temperature, recipe.relation_heads, targets, kind, settings.deviation)
            return {
                name: weight * LOSSES[name].compute(outputs, expected, context)
                for name, weight in matching.losses.items()
            }  # fmt: skip

        yield compute
