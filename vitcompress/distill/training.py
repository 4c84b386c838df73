"""What is the student's alone while it trains?  Weight decay, learning rate, drop path, checkpointing, running mean."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vitcompress.errors import RecipeError, raise_faults
from vitcompress.layers.transforms import TRANSFORM_MODULES
from vitcompress.recipe import DistillRecipe

Tensors = tuple[Tensor, ...] | list[Tensor]
_DROP_PATH = re.compile(r"(.+\.)?drop_path\d*")
_POSITION_TABLE = re.compile(r"relative_position|rel_pos|\brpe\b")  # where a model does not name its own


def parameter_groups(student: nn.Module, recipe: DistillRecipe) -> list[dict[str, Any]]:
    """Split the parameters in those with and without weight decay; each shared one comes once.

    Vectors, what timm exempts, tables of relative positions and transformations have none: decay pulls towards zero,
    and a head mix of zero is no identity.

    Args:
        student: any model.
        recipe: the weight decay.
    """
    exempt = set(student.no_weight_decay()) if hasattr(student, "no_weight_decay") else set()  # type: ignore[operator]
    added = {
        id(p) for module in student.modules() if isinstance(module, TRANSFORM_MODULES) for p in module.parameters()
    }
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in student.named_parameters():
        spared = p.ndim <= 1 or name in exempt or id(p) in added or _POSITION_TABLE.search(name)
        (plain if spared else decay).append(p)
    return [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def optimizers(student: nn.Module, recipe: DistillRecipe, matrices: Collection[str]) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the blocks' whole matrices and AdamW for the rest, factors among it.

    Muon updates by the orthogonalised momentum of each matrix. It gains much where shared matrices have far to go, and
    costs little: only the matrices that are left are orthogonalised.

    Args:
        student: shares its parameters.
        recipe: which optimizer, learning rates and weight decay.
        matrices: full names of the blocks' matrices.

    Source: Jordan et al. 2024, Muon; Loshchilov and Hutter 2019, arXiv:1711.05101, AdamW.
    """
    groups = parameter_groups(student, recipe)
    mine = [p for name, p in student.named_parameters() if name in matrices and p.ndim == 2]
    if recipe.optimizer == "adamw" or not mine:  # none where all layers are made of factors alone
        return [torch.optim.AdamW(groups, lr=recipe.peak_lr)]
    taken = {id(p) for p in mine}
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
    return [
        torch.optim.Muon(mine, lr=recipe.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=recipe.peak_lr),
    ]


def lr_for_start(divergence: float, of_chance: float, batch_size: int, width: int) -> float:
    """Peak learning rate of AdamW for a start: small where little is lost, up to ten times that where all is.

    Chosen on a small model and on DeiT-Tiny: docs/explanation.md. With the square root of the batch, as noise has it.

    Args:
        divergence: KL of the start's predictions, nats per image.
        of_chance: the same of predictions that know nothing of the image.
        batch_size: images per step.
        width: channels of the model: the wider, the smaller the steps from a far start.

    Source: ours; for the square root, Malladi et al. 2022, arXiv:2205.10287; for the width, Yang et al. 2022,
        arXiv:2203.03466, Sec. 3.
    """
    lost = min(1.0, divergence / of_chance) if of_chance > 0 else 1.0
    most = min(10.0, max(2.0, 960 / width))
    return float(5e-5 * most**lost * math.sqrt(batch_size / 16))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak, in place."""
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor


def lr_factor(done: float, warmup: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine.

    Args:
        done: share of the training that is over, 0–1.
        warmup: share spent warming up.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def check_student(model: nn.Module, blocks: Sequence[str], recipe: DistillRecipe, *, name: str) -> None:
    """Make sure that the student can train as asked.

    Args:
        model: the model to be compressed; meta will do.
        blocks: names of its blocks.
        recipe: drop path, checkpointing and losses asked for.
        name: what the user called the model.

    Raises:
        RecipeError: it cannot; every fault at once.
    """
    faults = []
    if recipe.drop_path and not all(_drop_paths(model.get_submodule(block)) for block in blocks):
        faults.append((f"--drop-path {recipe.drop_path:g}: the blocks of {name} have no drop path.", "Leave it out."))
    if recipe.grad_checkpointing and not hasattr(model, "set_grad_checkpointing"):
        faults.append((f"--grad-checkpointing: {name} cannot do it.", "Use a smaller --batch-size to save memory."))
    if recipe.label_smoothing and not (recipe.loss or {}).get("labels"):
        message = f"--label-smoothing {recipe.label_smoothing:g}: there is no labels loss to smooth."
        faults.append((message, "Add --loss labels=1."))
    raise_faults(RecipeError, faults)


@contextmanager
def training_student(student: nn.Module, blocks: Sequence[str], recipe: DistillRecipe) -> Iterator[None]:
    """Give the student drop path and checkpointing, in place, until the context ends; it ends in eval mode.

    Drop path grows linearly with depth, as in timm, and each block keeps its own rate, whatever it shares.

    Args:
        student: any timm model.
        blocks: names of its blocks, in order.
        recipe: what it is given.
    """
    before: list[tuple[nn.Module, str, nn.Module]] = []
    for number, block in enumerate(blocks if recipe.drop_path else ()):
        rate = recipe.drop_path * number / max(1, len(blocks) - 1)
        for path in _drop_paths(student.get_submodule(block)):
            owner_path, _, leaf = f"{block}.{path}".rpartition(".")
            owner = student.get_submodule(owner_path)
            before.append((owner, leaf, getattr(owner, leaf)))
            setattr(owner, leaf, DropPath(rate))
    if recipe.grad_checkpointing:
        student.set_grad_checkpointing(True)  # type: ignore[operator]
    student.train()
    try:
        yield
    finally:
        if recipe.grad_checkpointing:
            student.set_grad_checkpointing(False)  # type: ignore[operator]
        for owner, leaf, module in before:
            setattr(owner, leaf, module)
        student.eval()


@contextmanager
def compiling(student: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Compile blocks of the student, in place, until the context ends.

    Block by block and not the whole: blocks that are alike are compiled once, and hooks between them go on working.

    Args:
        student: any model.
        blocks: names of the blocks to compile; none where nothing is to be compiled.
    """
    modules = [student.get_submodule(block) for block in blocks]
    if not modules:
        yield
        return
    from torch._dynamo import config  # seldom wanted, and slow to import

    for module in modules:
        module.compile()
    try:
        # blocks that are read have hooks and others have none: torch would take what it compiled for one for the other
        with config.patch(skip_nnmodule_hook_guards=False):
            yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


def _drop_paths(block: nn.Module) -> list[str]:
    return [name for name, _ in block.named_modules() if _DROP_PATH.fullmatch(name)]


def running_mean(student: nn.Module, decay: float) -> AveragedModel:
    """A copy of `student` that `update_parameters` draws after it.

    torch's and not timm's: that goes through the state dict, where a shared weight stands once per block, and so
    decays it as many times a step.

    Args:
        student: shares its parameters; so will the copy.
        decay: share of the mean that stays at a step. It rises to that from 1/10, as (1 + step)/(10 + step), since
            a mean over more steps than there were is a mean of the start.
    """
    mean = AveragedModel(student, multi_avg_fn=_average(decay))
    mean.n_averaged = mean.n_averaged.cpu()  # torch asks it twice a step, which would wait for a GPU
    return mean


def _average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    @torch.no_grad()
    def update(mean: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        step = float(num_averaged)
        torch._foreach_lerp_(mean, current, 1 - min(decay, (1 + step) / (10 + step)))

    return update


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Set the parameters of `target` to those of `source`, a model of the same structure, in place."""
    with torch.no_grad():
        for mine, other in zip(target.parameters(), source.parameters(), strict=True):
            mine.copy_(other)
