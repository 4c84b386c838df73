import pytest

from tests.factories import compressed, tiny
from vitcompress.distill.optimizers import make_optimizers
from vitcompress.distill.schedule import lr_factor, lr_for_start, set_lr
from vitcompress.recipe import DEFAULT_LR, DistillRecipe


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    assert lr_factor(0.05, 0.1) == pytest.approx(0.5)
    assert lr_factor(0.1, 0.1) == 1.0
    assert lr_factor(0.55, 0.1) == pytest.approx(0.5)
    assert lr_factor(1.0, 0.1) == pytest.approx(0.0)
    assert lr_factor(0.0, 0.0) == 1.0


def test_the_learning_rate_of_a_start_in_closed_form() -> None:
    assert lr_for_start(0.0, 2.0, 16, 96) == pytest.approx(5e-5)
    assert lr_for_start(2.0, 2.0, 16, 96) == pytest.approx(5e-4)
    assert lr_for_start(1.0, 2.0, 16, 96) == pytest.approx(5e-5 * 10**0.5)
    # noise falls with the square root of the batch size
    assert lr_for_start(1.0, 2.0, 64, 96) == pytest.approx(1e-4 * 10**0.5)
    assert lr_for_start(50.0, 2.0, 16, 96) == pytest.approx(5e-4)  # worse than chance counts as chance
    assert lr_for_start(0.0, 0.0, 16, 96) == pytest.approx(5e-4)  # a teacher with constant predictions
    assert lr_for_start(2.0, 2.0, 16, 192) == pytest.approx(2.5e-4)
    assert lr_for_start(2.0, 2.0, 16, 768) == lr_for_start(2.0, 2.0, 16, 1408) == pytest.approx(1e-4)
    assert lr_for_start(2.0, 2.0, 16, 24) == pytest.approx(5e-4)


def test_a_typed_learning_rate_wins_over_the_constant() -> None:
    assert DistillRecipe(lr=3e-4).peak_lr == 3e-4
    assert DistillRecipe().peak_lr == DEFAULT_LR


def test_learning_rates_follow_their_own_peaks() -> None:
    student, plan = compressed(tiny(), share=2)
    both = make_optimizers(student, DistillRecipe(optimizer="muon", lr=1e-3, matrix_lr=0.02), plan.matrices)
    for factor in (0.5, 0.1):
        for optimizer in both:
            set_lr(optimizer, factor)
    assert [group["lr"] for optimizer in both for group in optimizer.param_groups] == pytest.approx([2e-3, 1e-4, 1e-4])
