import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitcompress.distill.losses import (
    LOSSES,
    LossContext,
    Outputs,
    attention_relations,
    cross_entropy,
    hidden_mse,
    hidden_relations,
    kl_logits,
    label_cross_entropy,
    scaled_mse,
)
from vitcompress.distill.relations import BLOCK_BYTES, relation_kl
from vitcompress.recipe import LOSS_NAMES


def test_kl_by_hand() -> None:
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # p = 3/4, 1/4
    student = torch.tensor([[0.0, 0.0]])  # q = 1/2, 1/2
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl_logits(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_kl_with_a_temperature_by_hand() -> None:
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert kl_logits(torch.zeros(1, 2), teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-6)


def test_kl_is_per_image_and_zero_where_equal() -> None:
    logits = torch.randn(3, 7)
    other = torch.randn(3, 7)
    assert kl_logits(logits, logits).item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(kl_logits(logits, other), kl_logits(logits.repeat(4, 1), other.repeat(4, 1)))


def test_the_loss_of_labels_is_binary_cross_entropy_less_the_teachers_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 4, generator=generator)
    student = torch.randn(3, 4, generator=generator, requires_grad=True)
    loss = label_cross_entropy(student, teacher)
    p = teacher.sigmoid()
    full = F.binary_cross_entropy_with_logits(student, p, reduction="none").sum(1).mean()
    entropy = F.binary_cross_entropy(p, p, reduction="none").sum(1).mean()
    torch.testing.assert_close(loss, full - entropy)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, full)))
    assert label_cross_entropy(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert label_cross_entropy(teacher + 5, teacher).item() > 1
    twice = label_cross_entropy(2 * student, 2 * teacher, temperature=2.0)
    torch.testing.assert_close(twice, 4 * loss)


def test_the_loss_of_numbers_is_in_the_teachers_deviation() -> None:
    teacher = torch.tensor([[1.0, 100.0], [3.0, 300.0]])
    deviation = torch.tensor([1.0, 100.0])
    mean = teacher.mean(0, keepdim=True).expand_as(teacher)
    assert scaled_mse(mean, teacher, deviation).item() == pytest.approx(1)
    assert scaled_mse(teacher + deviation / 2, teacher, deviation).item() == pytest.approx(0.25)
    assert scaled_mse(teacher, teacher, deviation).item() == 0


def test_relations_are_exact_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 9, 16, generator=generator)
    student = (teacher + 0.1 * torch.randn(2, 9, 16, generator=generator)).requires_grad_()
    exact = relation_kl([student], [teacher])
    with torch.autocast("cpu", torch.bfloat16):
        found = relation_kl([student], [teacher])
    assert torch.equal(found, exact)
    assert torch.equal(*(torch.autograd.grad(kl, student)[0] for kl in (found, exact)))


def test_no_gradient_flows_into_the_teacher() -> None:
    student, teacher = (torch.randn(2, 4, requires_grad=True) for _ in range(2))
    kl_logits(student, teacher).backward()
    hidden_mse([student], [teacher]).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_hidden_mse_by_hand() -> None:
    """Normalised over channels, [3, 1] is [1, -1] and [0, 5] is [-1, 1]."""
    student, teacher = torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[0.0, 5.0]]])
    assert hidden_mse([student], [teacher]).item() == pytest.approx(4.0, rel=1e-3)
    assert hidden_mse([student, teacher], [teacher, teacher]).item() == pytest.approx(2.0, rel=1e-3)


def test_hidden_mse_ignores_scale_and_wants_as_many_blocks() -> None:
    h = torch.randn(2, 3, 8)
    assert hidden_mse([10 * h], [h]).item() == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="zip"):
        hidden_mse([h], [h, h])


def reference(student: list[Tensor], teacher: list[Tensor], heads: int) -> float:
    """Relations as in the paper, pair by pair and head by head, in float64."""

    def relation(a: Tensor, b: Tensor) -> Tensor:
        return torch.softmax(a @ b.T / a.shape[-1] ** 0.5, dim=-1)

    found = []
    for i, j in itertools.product(range(len(student)), repeat=2):
        for image, head in itertools.product(range(student[0].shape[0]), range(heads)):
            mine, yours = ([t.double().chunk(heads, -1)[head][image] for t in states] for states in (student, teacher))
            p, q = relation(yours[i], yours[j]), relation(mine[i], mine[j])
            found.append((-(p * q.log()).sum(-1) + (p * p.log()).sum(-1)).mean())
    return float(torch.stack(found).mean())


def triple(seed: int, tokens: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, tokens, width, dtype=dtype, generator=generator) for _ in range(3))
    return q, k, v


def test_a_relation_by_hand() -> None:
    """Tokens [0, 1] of one channel: rows of S Sᵀ are (0, 0) and (0, 1); the teacher's are zero."""
    student, teacher = torch.tensor([[[0.0], [1.0]]]), torch.zeros(1, 2, 1)
    second = 0.5 * math.log(0.5 * (1 + math.e)) + 0.5 * math.log(0.5 * (1 + math.e) / math.e)
    assert hidden_relations([student], [teacher]).item() == pytest.approx(second / 2, rel=1e-6)
    assert hidden_relations([student, teacher], [teacher, teacher]).item() == pytest.approx(second / 4, rel=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_nine_attention_relations_in_float64(heads: int) -> None:
    """The teacher is twice as wide, as relation heads allow."""
    blocks = [(triple(0, 5, 8), triple(1, 5, 16)), (triple(2, 7, 8), triple(3, 7, 8))]
    expected = [reference(list(s), list(t), heads) for s, t in blocks]
    found = attention_relations([s for s, _ in blocks], [t for _, t in blocks], heads=heads)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_hidden_relations_in_float64() -> None:
    student, teacher = triple(0, 6, 8)[0], triple(1, 6, 12)[0]
    expected = reference([student], [teacher], 1)
    assert hidden_relations([student], [teacher]).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.broad
@pytest.mark.parametrize("at_once", [1, 2**20], ids=["image by image", "all at once"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_gradient_of_a_relation_is_that_of_autograd(
    parts: int, heads: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCK_BYTES, "cpu", at_once)
    student = [part.requires_grad_() for part in triple(0, 4, 6)[:parts]]
    teacher = triple(1, 4, 6)[:parts]
    assert torch.autograd.gradcheck(lambda *s: 7 * relation_kl(s, teacher, heads=heads), student)


@pytest.mark.parametrize("chosen_before", [False, True])
def test_relations_of_chosen_tokens_are_those_of_a_subset(chosen_before: bool) -> None:
    """In value and gradient, even if the teacher's tensors hold only these tokens."""
    tokens = torch.tensor([0, 2, 3])
    student = [part.requires_grad_() for part in triple(0, 5, 6)]
    teacher = triple(1, 5, 6)
    few = [part[:, tokens] for part in teacher]

    def choose(num_tokens: int, device: torch.device) -> Tensor | None:
        return tokens if num_tokens > 3 else None

    found = relation_kl(student, few if chosen_before else teacher, choose=choose)
    expected = relation_kl([part[:, tokens] for part in student], few)
    torch.testing.assert_close(found, expected)
    for ours, plain in zip(torch.autograd.grad(found, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(ours, plain)
        assert ours[:, [1, 4]].abs().max() == 0


def test_half_precision_is_computed_in_single() -> None:
    s, t = triple(0, 5, 8, torch.bfloat16), triple(1, 5, 8, torch.bfloat16)
    found = attention_relations([s], [t])
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(reference(list(s), list(t), 1), rel=1e-5)


def test_no_relation_outlives_the_forward_pass() -> None:
    """The backward pass keeps no more than the states, whatever the number of tokens."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    student = torch.randn(2, 300, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        relation_kl([student] * 3, torch.randn(3, 2, 300, 4).unbind())
    assert kept == [student.numel()] * 3


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    targets = torch.tensor([[0.9, 0.1], [0.0, 1.0]])
    expected = (-0.9 * math.log(0.75) - 0.1 * math.log(0.25) - math.log(0.5)) / 2
    assert cross_entropy(logits, targets).item() == pytest.approx(expected, rel=1e-6)


def test_the_recipe_names_the_losses_that_there_are() -> None:
    assert tuple(LOSSES) == LOSS_NAMES


def test_every_loss_is_zero_where_student_and_teacher_are_one() -> None:
    states = torch.randn(2, 3, 4)
    out = Outputs(torch.tensor([[90.0, 0.0]]), [states], [states], [(states, states + 1, states - 1)])
    context = LossContext(targets=torch.tensor([[1.0, 0.0]]))
    assert all(abs(loss.compute(out, out, context).item()) < 1e-5 for loss in LOSSES.values())
