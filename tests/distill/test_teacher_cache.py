"""A run on the same views uses the cached logits; a cache of anything else is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Vitcompress
from tests.distill.test_checkpoints import same_tensors
from vitcompress.data.loaders import ProcessShare
from vitcompress.distill.teacher_cache import TeacherCache
from vitcompress.errors import RecipeError


@pytest.fixture
def words(teacher: Sequence[str], flat: Path, tmp_path: Path) -> list[object]:
    flags: list[object] = ["--data", flat, "--share", 2, "--batch-size", 4, "--steps", 4, "--loss", "logits=1"]
    more: list[object] = ["--device", "cpu", "--num-workers", 0, "--no-baselines", "--mixup", 0.8]
    return ["compress", *teacher, *flags, *more, "--cache-teacher", tmp_path / "said"]


@pytest.mark.thorough
def test_the_second_run_does_not_ask_and_ends_the_same(
    words: list[object], tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    whole = TeacherCache.get

    def get(self: TeacherCache, step: int, part: int, ask: object) -> torch.Tensor:
        def counted() -> torch.Tensor:
            asked.append((step, part))
            return ask()  # type: ignore[operator, no-any-return]

        return whole(self, step, part, counted)

    monkeypatch.setattr(TeacherCache, "get", get)
    paths = [tmp_path / f"{name}.safetensors" for name in "abcd"]
    plain = words[: words.index("--cache-teacher")]
    assert vitcompress(*plain, "--out", paths[0]).code == 0
    for path in paths[1:3]:
        assert vitcompress(*words, "--out", path).code == 0
    assert asked == [(step, 0) for step in range(4)]
    assert same_tensors(paths[0], paths[1])
    assert same_tensors(paths[0], paths[2])
    # the views do not depend on learning rate and plan; a longer run adds to the cache
    assert vitcompress(*words, "--lr", 1e-4, "--share", 4, "--steps", 6, "--out", paths[3]).code == 0
    assert asked[4:] == [(4, 0), (5, 0)]


@pytest.mark.broad
@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (["--seed", 1], "--seed: 1, was 0"),
        (["--hflip", 0], "--hflip: 0.0, was 0.5"),
        (["--batch-size", 6], "--batch-size: 6, was 4"),
        (["--data", "other"], "training images: 15 images"),
    ],
)
def test_other_views_are_refused(
    changed: list[object], line: str, words: list[object], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    assert vitcompress(*words, "--out", tmp_path / "a.safetensors").code == 0
    changed = [images if word == "other" else word for word in changed]
    ended = vitcompress(*words, *changed, "--out", tmp_path / "b.safetensors")
    assert (ended.code, line in ended.err) == (2, True), ended.err
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--loss", "hidden=1"], "need more of the teacher"),
        (["--max-minutes", 1], "is not known"),
        (["--loss", "logits=0", "--loss", "labels=1"], "no loss needs a teacher"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_any_work(
    more: list[object], line: str, words: list[object], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    at = words.index("--steps")
    words = [*words[:at], *words[at + 2 :]] if "--max-minutes" in more else words
    ended = vitcompress(*words, "--data", images, *more, "--out", tmp_path / "a.safetensors")
    assert (ended.code, line in ended.err) == (2, True), ended.err
    assert not (tmp_path / "said").exists()


def cache(folder: Path, *, steps: int = 3, share: ProcessShare | None = None) -> TeacherCache:
    return TeacherCache(
        folder, {"teacher.sha256": "abc"}, num_steps=steps, batch_size=8, num_classes=5, share=share or ProcessShare()
    )


def test_each_process_and_part_has_rows_of_its_own(tmp_path: Path) -> None:
    rows = [
        cache(tmp_path / "said", share=ProcessShare(process, 2, 2)).rows(1, part)
        for process in range(2)
        for part in range(2)
    ]
    assert sorted(np.concatenate(rows).tolist()) == list(range(8, 16))


@pytest.mark.parametrize("text", ["[]", "1", "{", "[" * 100_000, '{"teacher.sha256": 1}'])
def test_facts_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(RecipeError, match=f"--cache-teacher {tmp_path}"):
        cache(tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing takes room on the disk here")
def test_room_is_taken_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(tmp_path / "small")
    assert (tmp_path / "small" / "logits.f32").stat().st_blocks * 512 >= 3 * 8 * 5 * 4

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RecipeError, match="No space left"):
        cache(tmp_path / "large")
    assert (tmp_path / "large" / "logits.f32").stat().st_size == 0


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("mine")
    with pytest.raises(RecipeError, match="something else"):
        cache(tmp_path / "letters")
    with pytest.raises(RecipeError, match="something else"):
        cache(tmp_path / "letters" / "a.txt")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["a.txt"]
