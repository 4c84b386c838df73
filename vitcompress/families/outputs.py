"""Decide what a model's outputs are, and how far the outputs of two models differ.

The kinds are in `KINDS`. What else depends on the kind is in tables by its name: the loss in
`distill.losses`, the numbers of the report in `measure.tally`, the examples in `measure.examples`,
the words in `report.kinds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.errors import ModelError

_CONSTANT = 1e-4  # of its size: an output that varies less does not depend on the image
_TOLD = "told_outputs"  # attribute of a model that was built by its name


@dataclass(frozen=True)
class OutputKind:
    """One kind of outputs.

    Attributes:
        name: as `--outputs`, artifacts and reports name it.
        noun: what the outputs are, for messages.
        loss: name of the loss that compares the models' outputs.
        losses: names of all losses that take these outputs.
        has_temperature: whether that loss has a temperature.
        uses_deviation: whether differences are measured in the teacher's deviation over images.
        nats: `(student [N, K], teacher [N, K], deviation [K]) -> [N]`; KL(teacher || student) of
            each image's prediction; None if the outputs are no prediction.
        mean: `(outputs [N, K]) -> [K]`; outputs of the mean prediction, which ignores the image.
        score: `(outputs [N, K], deviation [K], generator) -> scalar`; the outputs times random
            directions, summed over images. The covariance of the directions is the predictions'
            Fisher information, so that a change that costs c nats changes an image's score by 2·c
            in the mean square.
    """

    name: str
    noun: str
    loss: str
    losses: frozenset[str]
    has_temperature: bool
    uses_deviation: bool
    nats: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    mean: Callable[[Tensor], Tensor]
    score: Callable[[Tensor, Tensor, torch.Generator], Tensor]


def outputs_of(model: nn.Module) -> OutputKind:
    """Return the kind of a model's outputs: as it was told, or by the number of outputs.

    Without a head it is features; a single output is regression, since softmax of one is constant;
    several outputs are classes.
    """
    num_outputs = getattr(model, "num_classes", 0)
    if not num_outputs:
        return FEATURES
    default = REGRESSION if num_outputs == 1 else CLASSES
    return KINDS[told_outputs(model) or default.name]


def told_outputs(model: nn.Module) -> str | None:
    """Return the name of the kind that a model was told to have; None if it was not told."""
    name: str | None = getattr(model, _TOLD, None)
    return name


def tell_outputs(model: nn.Module, kind: str | None, *, name: str) -> None:
    """Tell a model the kind of its outputs, in place.

    Args:
        model: any model.
        kind: name of the kind; None to let the number of outputs decide.
        name: name of the model in messages.

    Raises:
        ModelError: the model cannot have such outputs.
    """
    num_outputs = getattr(model, "num_classes", 0)
    if kind is not None and not num_outputs:
        raise ModelError(f"--outputs {kind}: {name} has no head; its outputs are features.", hint="Remove --outputs.")
    if kind == CLASSES.name and num_outputs == 1:
        raise ModelError(
            f"{name} has one output, which cannot be classes: the softmax of one number is always 1.",
            hint="Give --outputs regression, or --outputs multi_label for a sigmoid.",
        )
    setattr(model, _TOLD, kind)


def has_classes(model: nn.Module) -> bool:
    """Return whether a model outputs logits of classes, so that labels of images name them."""
    return outputs_of(model) is CLASSES


def count_classes(model: nn.Module) -> int:
    """Return the number of classes that labels of images can name; 0 for outputs of other kinds."""
    return int(getattr(model, "num_classes", 0)) if has_classes(model) else 0


def outputs_on(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return a model's outputs `[N, …]` for batches of images `[B, C, H, W]`, without gradients."""
    with torch.no_grad():
        return torch.cat([model(images).float() for images in batches])


def deviation_of(outputs: Tensor) -> Tensor:
    """Return the standard deviation of each output over images: the unit of regression's errors.

    An output that does not depend on the image gets a ten-thousandth of its size, so that rounding
    is no error and a change still is one.

    Args:
        outputs: of the teacher, `[N, K]`; a single image gives the size of its outputs.

    Returns:
        `[K]`, positive.
    """
    outputs = outputs.detach().double()
    size = outputs.square().mean(0).sqrt()
    return floored_deviation(outputs.std(0, correction=0) if len(outputs) > 1 else size, size).float()


def floored_deviation(deviation: Tensor, size: Tensor) -> Tensor:
    """Return deviations `[K]`, at least a ten-thousandth of the outputs' size, and never 0."""
    deviation = torch.maximum(deviation, _CONSTANT * size)
    return torch.where(deviation > 0, deviation, torch.ones_like(deviation))


# --- classes


def _class_nats(student: Tensor, teacher: Tensor, deviation: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _class_mean(outputs: Tensor) -> Tensor:
    return F.log_softmax(outputs, -1).logsumexp(0) - math.log(len(outputs))


def _class_score(outputs: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    p = outputs.detach().softmax(-1)  # the covariance is diag(p) − p pᵀ
    direction = p.sqrt() * _signs(outputs, generator)
    return (outputs * (direction - p * direction.sum(-1, keepdim=True))).sum()


def _signs(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs for each output; drawn labels scatter more where predictions are certain."""
    return (2 * torch.randint(2, outputs.shape, generator=generator) - 1).to(outputs)


# --- labels, each with a probability of its own


def bernoulli_nats(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of independent labels, in nats per label.

    Args:
        student: logits `[N, K]`.
        teacher: logits `[N, K]`.

    Returns:
        `[N, K]`: binary cross-entropy against the teacher's probabilities, less their entropy.
    """
    p = teacher.sigmoid()
    yes = F.logsigmoid(teacher) - F.logsigmoid(student)
    no = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return p * yes + (1 - p) * no


def _label_nats(student: Tensor, teacher: Tensor, deviation: Tensor) -> Tensor:
    return bernoulli_nats(student, teacher).sum(-1)


def _label_mean(outputs: Tensor) -> Tensor:
    return outputs.sigmoid().mean(0).logit(eps=1e-7)


def _label_score(outputs: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    p = outputs.detach().sigmoid()
    return (outputs * (p * (1 - p)).sqrt() * _signs(outputs, generator)).sum()


# --- numbers


def _number_nats(student: Tensor, teacher: Tensor, deviation: Tensor) -> Tensor:
    """Half the squared error in deviations: KL of Gaussians that have the teacher's."""
    return ((student - teacher) / deviation).square().sum(-1) / 2


def _number_mean(outputs: Tensor) -> Tensor:
    return outputs.mean(0)


def _number_score(outputs: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    return _projection(outputs / deviation, deviation, generator)


# --- features


def _projection(outputs: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random projection of the outputs, summed over images."""
    return (outputs * torch.randn(outputs.shape, generator=generator).to(outputs)).sum()


CLASSES = OutputKind(
    "classes", "logits of classes", "logits", frozenset({"logits", "labels"}), True, False,
    _class_nats, _class_mean, _class_score,
)  # fmt: skip
MULTI_LABEL = OutputKind(
    "multi_label", "logits of independent labels (multi_label)", "logits", frozenset({"logits"}), True, False,
    _label_nats, _label_mean, _label_score,
)  # fmt: skip
REGRESSION = OutputKind(
    "regression", "numbers (regression)", "logits", frozenset({"logits"}), False, True,
    _number_nats, _number_mean, _number_score,
)  # fmt: skip
FEATURES = OutputKind(
    "features", "features", "features", frozenset({"features"}), False, False, None, _number_mean, _projection,
)  # fmt: skip
KINDS = {kind.name: kind for kind in (CLASSES, MULTI_LABEL, REGRESSION, FEATURES)}
