"""Distillation losses: pure functions of tensors, and the table `LOSSES` that names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcompress.distill.relations import TokenChooser, all_tokens, relation_kl
from vitcompress.families.outputs import CLASSES, OutputKind, bernoulli_nats

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Outputs:
    """Tensors read from one forward pass.

    Attributes:
        logits: `[B, K]`; features `[B, C]` for a model without classes.
        hidden: output of each compared block, `[B, N, C]` or `[B, rows, columns, C]`.
        sampled: the same as sequences, `[B, N, C]`, for relations between the tokens that `choose`
            selects.
        qkv: queries, keys and values of each compared block, `[B, N, C]` each; `choose` applies to
            them too. With window attention, B counts windows.
        choose: `(number of tokens, device) -> indices [n]` of the tokens to relate; None for all.
    """

    logits: Tensor
    hidden: Sequence[Tensor] = ()
    sampled: Sequence[Tensor] = ()
    qkv: Sequence[QKV] = ()
    choose: TokenChooser = all_tokens


@dataclass(frozen=True)
class LossContext:
    """Further inputs of the losses.

    Attributes:
        temperature: T of the logits.
        relation_heads: number of heads that the width is split into for attention relations.
        targets: class probabilities `[B, K]` from the labels; None if no loss needs them.
        kind: kind of the models' outputs.
        deviation: the teacher's deviation of each output over images, `[K]`; None for kinds that
            do not use it.
    """

    temperature: float = 1.0
    relation_heads: int = 1
    targets: Tensor | None = None
    kind: OutputKind = CLASSES
    deviation: Tensor | None = None


def kl_logits(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softened class probabilities.

    Args:
        student: logits `[B, K]`.
        teacher: logits `[B, K]`; no gradient flows into them.
        temperature: T > 0, dimensionless; divides both logits.

    Returns:
        Scalar `[]`, nats per image times T², so that gradients keep their scale as T changes.

    Source: Hinton et al. 2015, arXiv:1503.02531, Sec. 2. DeiT's code divides by B·K, not B: its
        loss weights do not carry over.
    """
    log_p = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def label_cross_entropy(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Binary cross-entropy against the teacher's probabilities of labels, less their entropy.

    That is KL(teacher || student) of independent labels: the gradient is the cross-entropy's, and 0
    means equal.

    Args:
        student: logits `[B, K]`, each of a label of its own.
        teacher: logits `[B, K]`; no gradient flows into them.
        temperature: T > 0, dimensionless; divides both logits.

    Returns:
        Scalar `[]`, nats per image, summed over labels, times T², like `kl_logits`.

    Source: Hinton et al. 2015, arXiv:1503.02531, Sec. 2, with a sigmoid in the place of softmax.
    """
    nats = bernoulli_nats(student.float() / temperature, teacher.detach().float() / temperature)
    return nats.sum(-1).mean() * temperature**2


def scaled_mse(student: Tensor, teacher: Tensor, deviation: Tensor) -> Tensor:
    """Mean squared error of numbers, each in the teacher's deviation over images.

    Args:
        student: numbers `[B, K]`.
        teacher: numbers `[B, K]`; no gradient flows into them.
        deviation: standard deviation of each of the teacher's outputs, `[K]`.

    Returns:
        Scalar `[]`: mean over images and outputs; 0 for equal, 1 for the teacher's mean.

    Source: ours; the deviation gives the loss weight the same meaning for every unit.
    """
    scale = deviation.to(student.device)
    return F.mse_loss(student.float() / scale, teacher.detach().float() / scale)


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between features of models without a head, normalized over channels.

    Softmax and KL would treat features as scores of classes. Normalizing keeps a few channels of
    large variance from dominating, and gives the loss weight the same meaning for every model.

    Args:
        student: features `[B, C]`, or `[B, N, C]` without pooling.
        teacher: the teacher's features; no gradient flows into them.

    Returns:
        Scalar `[]`: mean over images and channels; 0 for equal, 2 for uncorrelated features.

    Source: ours; `hidden_mse` applied to the model's output.
    """
    return hidden_mse([student], [teacher])


def hidden_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error between hidden states, each token normalized over its channels.

    Normalizing makes blocks comparable (the residual stream grows with depth) and keeps a few
    channels with massive activations from dominating.

    Args:
        student: hidden states, one `[B, N, C]` or `[B, rows, columns, C]` per block.
        teacher: the teacher's hidden states; no gradient flows into them.

    Returns:
        Scalar `[]`: mean over blocks, images, tokens and channels; 0 for equal, 2 for uncorrelated
        states.

    Source: ours; normalized like the input of each block's attention (layer norm without its affine
        part).
    """
    errors = [
        F.mse_loss(F.layer_norm(s.float(), s.shape[-1:]), F.layer_norm(t.detach().float(), t.shape[-1:]))
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


def attention_relations(
    student: Sequence[QKV], teacher: Sequence[QKV], *, heads: int = 1, choose: TokenChooser = all_tokens
) -> Tensor:
    """KL(teacher || student) of the nine relations softmax(S_i S_jᵀ/√d), i and j of {Q, K, V}.

    Args:
        student: q, k and v of each block, `[B, N, C]` each.
        teacher: the teacher's, of any width that `heads` divides; no gradient flows into them.
        heads: number of relation heads, of d channels each; width and number of attention heads may
            differ from the teacher's.
        choose: selects the tokens to relate; the teacher's tensors may hold only these already.

    Returns:
        Scalar `[]`: nats per row of a relation; mean over rows, the nine pairs, heads, images and
        blocks.

    Source: MiniViT, arXiv:2204.07154, Sec. 3.3, self-attention distillation. The paper has the
        cross-entropy; KL subtracts the teacher's entropy, which has no gradient, so that 0 means
        equal.
    """
    errors = [relation_kl(s, t, heads=heads, choose=choose) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(errors).mean()


def hidden_relations(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, choose: TokenChooser = all_tokens
) -> Tensor:
    """KL(teacher || student) of softmax(H Hᵀ/√d), the relations between hidden states.

    Args:
        student: hidden states of each block, `[B, N, C]`.
        teacher: the teacher's, of any width; no gradient flows into them.
        choose: selects the tokens to relate; the teacher's tensors may hold only these already.

    Returns:
        Scalar `[]`: nats per row of a relation; mean over rows, images and blocks.

    Source: MiniViT, arXiv:2204.07154, Sec. 3.3, hidden-state distillation; KL instead of
        cross-entropy as above. The released code takes 49 times the squared error between cosine
        Gram matrices: its weight does not carry over.
    """
    errors = [relation_kl([s], [t], choose=choose) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(errors).mean()


def cross_entropy(student: Tensor, targets: Tensor | None) -> Tensor:
    """Cross-entropy between labels and class probabilities.

    Args:
        student: logits `[B, K]`.
        targets: class probabilities `[B, K]`, smoothed, and mixed like the images.

    Returns:
        Scalar `[]`, nats per image.
    """
    assert targets is not None  # the loss is only used with labels
    return F.cross_entropy(student.float(), targets)


@dataclass(frozen=True)
class Loss:
    """An entry of the table of losses.

    Attributes:
        compute: `(student, teacher, context) -> scalar`.
        reads: the field of `Outputs` that it needs.
        teacher: whether it needs the teacher's outputs.
    """

    compute: Callable[[Outputs, Outputs, LossContext], Tensor]
    reads: str
    teacher: bool = True

    @property
    def compares_blocks(self) -> bool:
        """Whether it compares values inside blocks, not only the models' outputs."""
        return self.reads != "logits"


def _scaled_mse(student: Tensor, teacher: Tensor, context: LossContext) -> Tensor:
    assert context.deviation is not None  # `weighted_losses` makes sure
    return scaled_mse(student, teacher, context.deviation)


OUTPUT_LOSSES: Mapping[str, Callable[[Tensor, Tensor, LossContext], Tensor]] = {
    "classes": lambda student, teacher, context: kl_logits(student, teacher, temperature=context.temperature),
    "multi_label": lambda student, teacher, context: label_cross_entropy(
        student, teacher, temperature=context.temperature
    ),
    "regression": _scaled_mse,
}
"""The loss `logits` by the kind of the models' outputs."""

LOSSES: Mapping[str, Loss] = {
    "logits": Loss(
        lambda student, teacher, context: OUTPUT_LOSSES[context.kind.name](student.logits, teacher.logits, context),
        reads="logits",
    ),
    "hidden": Loss(lambda student, teacher, context: hidden_mse(student.hidden, teacher.hidden), reads="hidden"),
    "attention": Loss(
        lambda student, teacher, context: attention_relations(
            student.qkv, teacher.qkv, heads=context.relation_heads, choose=student.choose
        ),
        reads="qkv",
    ),
    "hidden_relation": Loss(
        lambda student, teacher, context: hidden_relations(student.sampled, teacher.sampled, choose=student.choose),
        reads="sampled",
    ),
    "features": Loss(lambda student, teacher, context: feature_mse(student.logits, teacher.logits), reads="logits"),
    "labels": Loss(
        lambda student, teacher, context: cross_entropy(student.logits, context.targets), reads="logits", teacher=False
    ),
}


def needs_teacher(losses: Iterable[str]) -> bool:
    """Return whether any of the named losses reads a teacher."""
    return any(LOSSES[name].teacher for name in losses)
