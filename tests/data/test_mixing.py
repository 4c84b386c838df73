import numpy as np
import pytest
import torch
from timm.data import Mixup

from vitcompress.data.augmentation import Mixing, seeded
from vitcompress.errors import RecipeError
from vitcompress.recipe.compose import build


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Make constant images, so that a mixed image shows its mixing ratio."""
    labels = torch.arange(count) % 3
    return torch.arange(1.0, count + 1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone(), labels


def test_without_mixing_images_pass_by_and_labels_become_smoothed_targets() -> None:
    images, labels = batch(3)
    found, targets = Mixing(num_classes=4, smoothing=0.2)(images, labels, 0)
    assert found is images
    expected = torch.full((3, 4), 0.05)
    expected[range(3), range(3)] = 0.85
    torch.testing.assert_close(targets, expected)


def test_smoothing_is_that_of_torch() -> None:
    _, labels = batch(6)
    logits = torch.randn(6, 5)
    _, targets = Mixing(num_classes=5, smoothing=0.1)(torch.zeros(6, 1, 1, 1), labels, 0)
    assert targets is not None
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(logits, targets),
        torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1),
    )


def test_mixup_blends_images_and_labels_by_one_share() -> None:
    images, labels = batch(6)
    found, targets = Mixing(mixup=0.8, num_classes=3)(images, labels, 0)
    assert targets is not None
    share = (found[0, 0, 0, 0].item() - 6) / (1 - 6)  # image 1 with image 6
    assert 0 < share < 1
    expected = torch.zeros(3)
    expected[0] += share
    expected[2] += 1 - share
    torch.testing.assert_close(targets[0], expected)


def test_cutmix_pastes_and_weighs_by_area() -> None:
    for number in range(8):
        images, labels = batch(6)
        found, targets = Mixing(cutmix=1.0, num_classes=3)(images, labels, number)
        assert targets is not None
        assert set(found[0].unique().tolist()) <= {1.0, 6.0}
        torch.testing.assert_close(targets[0, 0], (found[0] == 1.0).float().mean())


def test_a_mix_is_timms_and_depends_on_seed_and_number_alone() -> None:
    def mixed(seed: int, number: int) -> torch.Tensor:
        return Mixing(mixup=0.8, cutmix=1.0, num_classes=3, seed=seed)(*batch(), number)[0]

    state = str(np.random.get_state())
    assert torch.equal(mixed(0, 5), mixed(0, 5))
    assert not torch.equal(mixed(0, 5), mixed(0, 6))
    assert not torch.equal(mixed(0, 5), mixed(1, 5))
    assert str(np.random.get_state()) == state
    with seeded(0, 1, 5):
        expected, _ = Mixup(0.8, 1.0, num_classes=3)(*batch())
    assert torch.equal(mixed(0, 5), expected)


def test_an_odd_batch_loses_its_last_image_and_a_single_one_is_left_alone() -> None:
    mixing = Mixing(mixup=0.8, num_classes=3)
    images, targets = mixing(*batch(5), 0)
    assert targets is not None
    assert (len(images), len(targets)) == (4, 4)
    single, labels = batch(1)
    assert mixing(single, labels, 0)[0] is single


def test_images_without_labels_can_be_mixed() -> None:
    images, _ = batch(4)
    found, targets = Mixing(mixup=0.8)(images.clone(), torch.full((4,), -1), 0)
    assert targets is None
    assert not torch.equal(found, images)


@pytest.mark.parametrize("flag", ["mixup", "cutmix"])
def test_an_odd_batch_size_is_refused(flag: str) -> None:
    with pytest.raises(RecipeError, match="--batch-size 7: must be even"):
        build({"model": "x", flag: 0.5, "batch_size": 7})
