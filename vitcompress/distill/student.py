"""Prepare the student for training: drop path, activation checkpointing and compilation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from timm.layers import DropPath
from torch import nn

from vitcompress.distill.small_views import small_views_fault
from vitcompress.errors import RecipeError, raise_faults
from vitcompress.families.view_size import half_size, view_size_fault
from vitcompress.recipe import DistillRecipe

_DROP_PATH = re.compile(r"(.+\.)?drop_path\d*")


def check_student(model: nn.Module, blocks: Sequence[str], recipe: DistillRecipe, *, name: str) -> None:
    """Check that the student can be trained as the recipe says.

    Args:
        model: the model to be compressed; may be on the meta device.
        blocks: names of its blocks.
        recipe: its drop path, checkpointing, losses and size of views are checked.
        name: the user's name for the model.

    Raises:
        RecipeError: it cannot; lists every fault.
    """
    faults = []
    if recipe.drop_path and not all(_drop_paths(model.get_submodule(block)) for block in blocks):
        faults.append((f"--drop-path {recipe.drop_path:g}: the blocks of {name} have no drop path.", "Leave it out."))
    if recipe.grad_checkpointing and not hasattr(model, "set_grad_checkpointing"):
        faults.append((f"--grad-checkpointing: {name} does not support it.", "Save memory by a smaller --batch-size."))
    if recipe.label_smoothing and not (recipe.loss or {}).get("labels"):
        message = f"--label-smoothing {recipe.label_smoothing:g}: there is no labels loss to smooth."
        faults.append((message, "Add --loss labels=1."))
    if recipe.small_first:
        faults += small_views_fault(view_size_fault(model, half_size(model)), recipe, name=name)
    raise_faults(RecipeError, faults)


@contextmanager
def training_student(student: nn.Module, blocks: Sequence[str], recipe: DistillRecipe) -> Iterator[None]:
    """Set the student up for training, in place: train mode, drop path and checkpointing.

    When the context ends, it is in eval mode, without drop path and checkpointing.

    Drop path grows linearly with depth, as in timm. Each block has its own rate, even if it shares
    its weights.

    Args:
        student: any timm model.
        blocks: names of its blocks, in order.
        recipe: drop path and checkpointing.
    """
    with ExitStack() as stack:
        stack.callback(student.eval)
        for number, block in enumerate(blocks if recipe.drop_path else ()):
            rate = recipe.drop_path * number / max(1, len(blocks) - 1)
            for path in _drop_paths(student.get_submodule(block)):
                owner_path, _, leaf = f"{block}.{path}".rpartition(".")
                owner = student.get_submodule(owner_path)
                stack.callback(setattr, owner, leaf, getattr(owner, leaf))
                setattr(owner, leaf, DropPath(rate))
        if recipe.grad_checkpointing:
            student.set_grad_checkpointing(True)  # type: ignore[operator]
            stack.callback(student.set_grad_checkpointing, False)  # type: ignore[arg-type]
        student.train()
        yield


@contextmanager
def compiling(student: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Compile blocks of the student, in place, until the context ends.

    Blocks are compiled one by one, not as a whole model: equal blocks are compiled once, and hooks
    between them keep working.

    Args:
        student: any model.
        blocks: names of the blocks to compile; empty to compile none.
    """
    modules = [student.get_submodule(block) for block in blocks]
    if not modules:
        yield
        return
    from torch._dynamo import config  # rarely needed, and slow to import

    for module in modules:
        module.compile()
    try:
        # only some blocks have hooks: without these guards torch would reuse code for the others
        with config.patch(skip_nnmodule_hook_guards=False):
            yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


def _drop_paths(block: nn.Module) -> list[str]:
    return [name for name, _ in block.named_modules() if _DROP_PATH.fullmatch(name)]
