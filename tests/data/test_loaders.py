"""Loaders give full batches in an order that only the seed decides, and every image once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from tests.conftest import draw_image
from tests.data.opened import RGB, folder_set, open_folder
from vitcompress.data.loaders import (
    Batch,
    ShuffledBatches,
    count_unreadable,
    default_num_workers,
    evaluation_loader,
    training_loader,
)
from vitcompress.data.sets import ImageSet
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe


def seen(images: ImageSet, num_workers: int, *, seed: int = 0, steps: int = 4) -> list[torch.Tensor]:
    recipe = DataRecipe(batch_size=5, num_workers=num_workers)
    return [batch.images for batch in training_loader(images, RGB, recipe, seed=seed, num_steps=steps)]


def test_the_stream_of_views_is_the_same_for_any_number_of_workers(flat: Path) -> None:
    alone, two = (seen(folder_set(flat), workers) for workers in (0, 2))
    assert len(alone) == 4
    assert all(torch.equal(a, b) for a, b in zip(alone, two, strict=True))


def test_another_seed_gives_other_views(flat: Path) -> None:
    one, other = (seen(folder_set(flat), 0, seed=seed, steps=1)[0] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_an_image_looks_different_in_every_pass(tmp_path: Path) -> None:
    draw_image(tmp_path / "only.png", 0)
    views = seen(folder_set(tmp_path), 0, steps=1)[0]
    assert len({view.numpy().tobytes() for view in views}) == 5


@pytest.mark.parametrize(("num_images", "batch_size"), [(1, 4), (7, 3), (8, 4), (3, 10)])
def test_every_batch_is_full_and_every_pass_sees_each_image_once(num_images: int, batch_size: int) -> None:
    steps = 3 * num_images
    batches = list(ShuffledBatches(num_images, batch_size, seed=0, num_steps=steps))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    keys = [key for batch in batches for key in batch]
    assert [draw for _, draw in keys] == list(range(steps * batch_size))
    for start in range(0, len(keys) - num_images + 1, num_images):
        assert sorted(position for position, _ in keys[start : start + num_images]) == list(range(num_images))


def test_passes_come_in_different_orders() -> None:
    keys = [position for batch in ShuffledBatches(50, 50, seed=0, num_steps=3) for position, _ in batch]
    assert len({tuple(keys[i : i + 50]) for i in (0, 50, 100)}) == 3


def test_a_stream_without_length_does_not_end() -> None:
    endless = iter(ShuffledBatches(2, 2, seed=0, num_steps=None))
    assert Counter(len(next(endless)) for _ in range(100)) == {2: 100}


def test_repeats_follow_each_other_with_draws_of_their_own() -> None:
    keys = [key for batch in ShuffledBatches(5, 6, seed=0, num_steps=5, repeats=3) for key in batch]
    assert [draw for _, draw in keys] == list(range(30))
    positions = [position for position, _ in keys]
    assert positions[::3] == positions[1::3] == positions[2::3]
    assert sorted(positions[:15:3]) == sorted(positions[15::3]) == list(range(5))


def test_the_order_of_repeats_is_that_of_timm() -> None:
    sampler = list(RepeatAugSampler(range(12), num_replicas=1, rank=0, num_repeats=3, selected_round=0))
    ours = [
        position
        for (batch,) in [list(ShuffledBatches(12, 12, seed=0, num_steps=1, repeats=3))]
        for position, _ in batch
    ]
    for order in (sampler, ours):
        assert len(order) == 12
        assert order[::3] == order[1::3] == order[2::3]
        assert len(set(order)) == 4


def test_evaluation_sees_every_image_once_in_order(images: Path) -> None:
    found = open_folder(images / "val", 5)
    batches = list(evaluation_loader(found, RGB, DataRecipe(batch_size=4, num_workers=0)))
    assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_an_unlabelled_image_has_label_minus_one(flat: Path) -> None:
    (batch,) = evaluation_loader(folder_set(flat), RGB, DataRecipe(num_workers=0))
    assert batch.labels.tolist() == [-1] * 12


@pytest.mark.parametrize(("given", "expected"), [("auto", 3), (None, 3), ("2", 2), (0, 0)])
def test_workers_are_a_number_or_as_many_as_there_are_cores_to_spare(
    given: Any, expected: int, flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    loader = training_loader(folder_set(flat), RGB, DataRecipe(num_workers=given), seed=0, num_steps=1)
    assert loader.num_workers == expected


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert default_num_workers() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_num_workers() == 7


def test_a_bad_image_is_named_or_counted() -> None:
    batch = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), ("x/bad.jpg: cut short", "y.png: empty"))
    with pytest.raises(DataError, match=r"x/bad\.jpg") as caught:
        count_unreadable(batch, skip=False)
    assert "--skip-bad-images" in caught.value.hint
    assert count_unreadable(batch, skip=True) == 2
    assert count_unreadable(Batch(batch.images, batch.labels, ()), skip=False) == 0


def test_good_images_of_a_batch_survive_a_bad_one(tmp_path: Path) -> None:
    for number in range(3):
        draw_image(tmp_path / f"{number}.png", number)
    (tmp_path / "1.png").write_bytes(b"no image")
    (batch,) = evaluation_loader(folder_set(tmp_path), RGB, DataRecipe(num_workers=0))
    assert batch.images.shape == (2, 3, 32, 32)
    assert len(batch.bad) == 1
    assert str(tmp_path / "1.png") in batch.bad[0]
