"""How far is the student from the teacher?  Pure functions of tensors, one line of the table each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcompress.distill.relations import Choice, all_tokens, relation_kl

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gave.

    Attributes:
        logits: `[B, K]`; features `[B, C]` of a model without classes.
        hidden: the output of each compared block, `[B, N, C]` or `[B, rows, columns, C]`.
        sampled: the same in one row, `[B, N, C]`; `choose` says which tokens of it relations are of.
        qkv: queries, keys and values of each compared block, each `[B, N, C]`, and again `choose`; for windows, B
            counts windows.
        choose: `(number of tokens, device) -> numbers [n]` of the tokens that relations are of; None for all of them.
    """

    logits: Tensor
    hidden: Sequence[Tensor] = ()
    sampled: Sequence[Tensor] = ()
    qkv: Sequence[QKV] = ()
    choose: Choice = all_tokens


@dataclass(frozen=True)
class Given:
    """What else a loss may look at.

    Attributes:
        temperature: T of the logits.
        relation_heads: parts that the width is cut into for attention relations.
        targets: class probabilities of the labels, `[B, K]`; None where they are not asked for.
    """

    temperature: float = 1.0
    relation_heads: int = 1
    targets: Tensor | None = None


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


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between features of models without a head, each image's normalised over its channels first.

    Softmax and KL would read features as odds between classes that there are not. Normalising keeps the few channels
    of large variance from being all that is learned, and makes the weight of the loss mean the same for every model.

    Args:
        student: features `[B, C]`, or `[B, N, C]` where nothing is pooled.
        teacher: the same of the teacher; no gradient flows into them.

    Returns:
        Scalar `[]`: mean over images and channels; 0 where equal, 2 where uncorrelated.

    Source: ours; `hidden_mse` of the model's output.
    """
    return hidden_mse([student], [teacher])


def hidden_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error between hidden states, each token normalised over its channels first.

    Normalising makes blocks comparable (the residual stream grows with depth) and keeps the few channels with
    massive activations from being all that is learned.

    Args:
        student: hidden states, one `[B, N, C]` or `[B, rows, columns, C]` per block.
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


def attention_relations(
    student: Sequence[QKV], teacher: Sequence[QKV], *, heads: int = 1, choose: Choice = all_tokens
) -> Tensor:
    """KL(teacher || student) of the nine relations softmax(S_i S_jᵀ/√d), i and j of {Q, K, V}.

    Args:
        student: q, k and v of each block, `[B, N, C]` each.
        teacher: the same of the teacher, of any width that `heads` divides; no gradient flows into them.
        heads: relation heads; the width is cut into as many parts of d channels, so that neither the width nor the
            number of attention heads need be the teacher's.
        choose: which tokens; the teacher's may be chosen already.

    Returns:
        Scalar `[]`: nats per row of a relation; mean over rows, the nine pairs, heads, images and blocks.

    Source: MiniViT, arXiv:2204.07154, Sec. 3.3, self-attention distillation. It has the cross-entropy; KL is that less
        the teacher's entropy, which has no gradient, so that 0 means equal.
    """
    errors = [relation_kl(s, t, heads=heads, choose=choose) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(errors).mean()


def hidden_relations(student: Sequence[Tensor], teacher: Sequence[Tensor], *, choose: Choice = all_tokens) -> Tensor:
    """KL(teacher || student) of softmax(H Hᵀ/√d), the relations between hidden states.

    Args:
        student: hidden states of each block, `[B, N, C]`.
        teacher: the same of the teacher, of any width; no gradient flows into them.
        choose: which tokens; the teacher's may be chosen already.

    Returns:
        Scalar `[]`: nats per row of a relation; mean over rows, images and blocks.

    Source: MiniViT, arXiv:2204.07154, Sec. 3.3, hidden-state distillation; KL for the cross-entropy as above. The
        released code takes 49 times the squared error between cosine Gram matrices: its weight does not carry over.
    """
    errors = [relation_kl([s], [t], choose=choose) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(errors).mean()


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy between labels and class probabilities.

    Args:
        student: logits `[B, K]`.
        targets: class probabilities `[B, K]`, smoothed and mixed as the images are.

    Returns:
        Scalar `[]`, nats per image.
    """
    return F.cross_entropy(student.float(), targets)


def _labels(student: Outputs, given: Given) -> Tensor:
    assert given.targets is not None  # whoever asks for the loss gives them
    return cross_entropy(student.logits, given.targets)


@dataclass(frozen=True)
class Loss:
    """One line of the table.

    Attributes:
        compute: `(student, teacher, given) -> scalar`.
        reads: the field of `Outputs` that it looks at.
        teacher: whether it looks at the teacher at all.
    """

    compute: Callable[[Outputs, Outputs, Given], Tensor]
    reads: str
    teacher: bool = True

    @property
    def of_blocks(self) -> bool:
        """Whether it compares what blocks give, not only what the models give."""
        return self.reads != "logits"


LOSSES: Mapping[str, Loss] = {
    "logits": Loss(
        lambda student, teacher, given: kl_logits(student.logits, teacher.logits, temperature=given.temperature),
        reads="logits",
    ),
    "hidden": Loss(lambda student, teacher, given: hidden_mse(student.hidden, teacher.hidden), reads="hidden"),
    "attention": Loss(
        lambda student, teacher, given: attention_relations(
            student.qkv, teacher.qkv, heads=given.relation_heads, choose=student.choose
        ),
        reads="qkv",
    ),
    "hidden_relation": Loss(
        lambda student, teacher, given: hidden_relations(student.sampled, teacher.sampled, choose=student.choose),
        reads="sampled",
    ),
    "features": Loss(lambda student, teacher, given: feature_mse(student.logits, teacher.logits), reads="logits"),
    "labels": Loss(lambda student, teacher, given: _labels(student, given), reads="logits", teacher=False),
}
