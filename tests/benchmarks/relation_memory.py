"""How much memory do relations take at 384 px and in Swin's first stage, unbounded and bounded?

One training step, forward and backward, against a teacher of the same size. The peak is that of the
bytes of all tensors alive, counted at every operation, so that it is the same on every machine and
at every load; what a kernel allocates for itself is not in it. "As released": pair by pair over all
tokens, in plain autograd.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitcompress.distill.hooks import ReadPoints, TokenSubset, reading_outputs
from vitcompress.distill.losses import Outputs, attention_relations, hidden_relations, kl_logits
from vitcompress.families.base import Tap

BATCH_SIZE = 2
SETTINGS = {
    "DeiT-Ti, 384 px (577 tokens)": ("deit_tiny_patch16_224", {"img_size": 384}, r"blocks.{}", range(12)),
    "Swin-T, 224 px, stage 1 (3136 tokens)": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 224},
        r"layers.0.blocks.{}",
        range(2),
    ),
}
Loss = Callable[[Outputs, Outputs], Tensor]


class PeakBytes(TorchDispatchMode):
    """Count the bytes of tensors that are made while the mode is on, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and look at what it made."""
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | given:
                    self.known.add(storage._cdata)
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def free(self, storage: int, num_bytes: int) -> None:
        """Take a storage off the count."""
        self.known.discard(storage)
        self.alive -= num_bytes


def released_relations(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Cross-entropy of every pair's relation, as the released code computes it."""
    losses = []
    for i, _ in enumerate(student):
        for j, _ in enumerate(student):
            q = student[i] @ student[j].mT / student[i].shape[-1] ** 0.5
            p = (teacher[i] @ teacher[j].mT / teacher[i].shape[-1] ** 0.5).softmax(-1)
            losses.append(-(p * F.log_softmax(q, -1)).sum(-1).mean())
    return torch.stack(losses).mean()


def released(student: Outputs, teacher: Outputs) -> Tensor:
    """Both kinds of relations, over what was read."""
    attention = [released_relations(list(s), list(t)) for s, t in zip(student.qkv, teacher.qkv, strict=True)]
    hidden = [released_relations([s], [t]) for s, t in zip(student.sampled, teacher.sampled, strict=True)]
    return torch.stack(attention).mean() + torch.stack(hidden).mean()


def ours(student: Outputs, teacher: Outputs) -> Tensor:
    """The same with a gradient that is computed at once."""
    return attention_relations(student.qkv, teacher.qkv, choose=student.choose) + hidden_relations(
        student.sampled, teacher.sampled, choose=student.choose
    )


VARIANTS: dict[str, tuple[Loss | None, int]] = {
    "logits only": (None, 196),
    "as released, all tokens": (released, 10**6),
    "gradient at once, all tokens": (ours, 10**6),
    "gradient at once, 128 tokens": (ours, 128),
}


@contextmanager
def peak_of_a_step(
    student: nn.Module, teacher: nn.Module, points: ReadPoints, most: int
) -> Iterator[Callable[..., int]]:
    """Yield `(loss, images) -> peak in bytes` of one step."""
    tokens, fields = TokenSubset(most, seed=0), {"sampled", "qkv"}

    def measure(loss: Loss | None, images: Tensor) -> int:
        with PeakBytes() as peak:
            with torch.no_grad():
                target = read_teacher(teacher(images))
            found = read_student(student(images))
            total = kl_logits(found.logits, target.logits)
            if loss is not None:
                total = total + loss(found, target)
            total.backward()
        return int(peak.peak)

    wanted = fields if most else set()
    with (
        reading_outputs(student, points, wanted, tokens) as read_student,
        reading_outputs(teacher, points, wanted, tokens) as read_teacher,
    ):
        yield measure


def run() -> str:
    """The table."""
    lines = [f"Batch {BATCH_SIZE}, single precision.", "", "| model | relations | peak |", "|---|---|---|"]
    for title, (name, args, pattern, numbers) in SETTINGS.items():
        torch.manual_seed(0)
        teacher = timm.create_model(name, **args).eval()
        blocks = tuple(pattern.format(number) for number in numbers)
        points = ReadPoints(blocks, tuple((Tap(f"{block}.attn.qkv"),) for block in blocks))
        images = torch.randn(BATCH_SIZE, 3, args["img_size"], args["img_size"])
        for variant, (loss, most) in VARIANTS.items():
            student = copy.deepcopy(teacher).train()
            with peak_of_a_step(student, teacher, points, most if loss else 0) as measure:
                lines.append(f"| {title} | {variant} | {measure(loss, images) / 1e6:,.0f} MB |")
    return "\n".join(lines)
