"""How far is the student from the teacher?  Pure functions of tensors, one line of the table each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gave.

    Attributes:
        logits: `[B, K]`.
        hidden: the output of each tapped block, `[B, N, C]`.
    """

    logits: Tensor
    hidden: Sequence[Tensor]


def kl_logits(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softened class probabilities.

    Args:
        student: logits `[B, K]`.
        teacher: logits `[B, K]`; no gradient flows into them.
        temperature: T > 0, dimensionless; divides both logits.

    Returns:
        Scalar `[]`, nats per image times T², so gradients keep their scale as T changes.

    Source: Hinton et al. 2015, arXiv:1503.02531, Sec. 2. DeiT's code divides by B·K,
        not B: its loss weights do not carry over.
    """
    log_p = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def hidden_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error between hidden states, each token normalised over its channels first.

    Normalising makes blocks comparable (the residual stream grows with depth) and keeps the few channels with
    massive activations from being all that is learned.

    Args:
        student: hidden states, one `[B, N, C]` per block.
        teacher: the same of the teacher; no gradient flows into them.

    Returns:
        Scalar `[]`: mean over blocks, images, tokens and channels; 0 where equal, 2 where uncorrelated.

    Source: ours; normalised as the input of each block's attention is (layer norm without its affine part).
    """
    errors = [
        F.mse_loss(F.layer_norm(s.float(), s.shape[-1:]), F.layer_norm(t.detach().float(), t.shape[-1:]))
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


LOSSES: Mapping[str, Callable[[Outputs, Outputs, float], Tensor]] = {
    "logits": lambda student, teacher, temperature: kl_logits(student.logits, teacher.logits, temperature=temperature),
    "hidden": lambda student, teacher, temperature: hidden_mse(student.hidden, teacher.hidden),
}
