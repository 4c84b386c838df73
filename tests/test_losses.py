import math

import pytest
import torch

from vitcompress.losses import LOSSES, Outputs, hidden_mse, kl_logits
from vitcompress.recipe import LOSSES as LOSS_NAMES


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


def test_the_recipe_names_the_losses_that_there_are() -> None:
    assert tuple(LOSSES) == LOSS_NAMES
    out = Outputs(torch.randn(2, 4), [torch.randn(2, 3, 4)])
    assert all(abs(loss(out, out, 1.0).item()) < 1e-5 for loss in LOSSES.values())
