"""Training of single blocks: what it changes, how near it comes, and how long it takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.factories import ROWS, build, images, planned, row_images, student_of, tiny
from vitcompress.distill import lessons, refine
from vitcompress.distill.lessons import TIMED_STEPS, Lesson, Training
from vitcompress.distill.refine import SINGLE_STATES, Refinement, groups_to_refine, refine_student
from vitcompress.families.registry import family_named
from vitcompress.initialize.inputs import Call, recording
from vitcompress.initialize.start import start_student
from vitcompress.plans.model import Plan


def how(steps: int, *, seed: int = 0, most: int = 1000, memory: float = 1e9, **more: Any) -> Refinement:
    return Refinement(steps, seed, most, memory, **more)


def started(teacher: nn.Module, x: Tensor, **recipe: Any) -> tuple[nn.Module, Plan]:
    plan = planned(teacher, **recipe)
    student = student_of(teacher, plan).eval()
    start_student(student, teacher, plan, lambda: x.split(16), "first")
    return student, plan


def off(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    """Mean squared error of the outputs, as a share of what there is to explain."""
    with torch.no_grad():
        expected = teacher(x)
        return float((student(x) - expected).square().mean() / (expected - expected.mean(0)).square().mean())


def refined(student: nn.Module, teacher: nn.Module, plan: Plan, x: Tensor, asked: Refinement) -> nn.Module:
    student = copy.deepcopy(student)
    refine_student(student, teacher, plan, x.split(16), asked)
    return student


def blocks_of(plan: Plan, **more: Any) -> list[str]:
    return [block for group in groups_to_refine(plan, how(1, **more)) for block in group.blocks]


@pytest.mark.parametrize(
    ("recipe", "left"),
    [
        ({"share": 1, "width": 0.5}, 0.5),
        ({"share": 1, "adapter_rank": 6, "matrices": False}, 0.95),
        ({"share": 2}, 0.8),
        ({"share": 2, "pattern": "cycle", "adapter_rank": 2}, 0.8),
        ({"share": 2, "width": 0.5}, 0.8),
    ],
    ids=["narrow", "low rank", "shared", "in turn", "narrow and shared"],
)
def test_the_student_comes_nearer_to_its_teacher_on_other_images_too(recipe: dict[str, Any], left: float) -> None:
    teacher = tiny()
    x = images(teacher, 160)
    student, plan = started(teacher, x[:128], **recipe)
    trained = refined(student, teacher, plan, x[:128], how(150))
    assert off(trained, teacher, x[:128]) < left * off(student, teacher, x[:128])
    assert off(trained, teacher, x[128:]) < left * off(student, teacher, x[128:])


def read(model: nn.Module, blocks: list[str], x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of blocks."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, call: Call) -> None:
        inputs[name], outputs[name] = call.input, call.output

    with torch.no_grad(), recording(model, blocks, note):
        model(x)
    return inputs, outputs


@pytest.mark.parametrize("row", ["swin", "swin v2", "beit", "eva02", "dinov3", "clip", "rope mixed", "headless tokens"])
def test_lessons_of_every_family_are_the_streams_between_blocks(row: str) -> None:
    """Single blocks get the student's inputs, shared ones the teacher's; targets are teacher's."""
    teacher = build(ROWS[row])
    x = torch.cat([row_images(ROWS[row]), -row_images(ROWS[row])])
    for share in (1, 2):
        student, plan = started(teacher, x, share=share, adapter_rank=4, matrices=share > 1)
        names = blocks_of(plan)
        assert len(names) == len(family_named(plan.family).block_names(teacher))
        inputs, targets = read(teacher if share > 1 else student, names, x)[0], read(teacher, names, x)[1]
        seen: list[Lesson] = []

        def note(training: Training, steps: int, seconds: float | None, tell: Any, seen: Any = seen) -> None:
            seen.extend(training.lessons)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "run", note)
            refine_student(student, teacher, plan, [x], how(1))
        assert [lesson.block for lesson in seen] == [student.get_submodule(name) for name in names]
        for name, lesson in zip(names, seen, strict=True):
            torch.testing.assert_close(lesson.given.x, inputs[name], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(lesson.target, targets[name], rtol=1e-4, atol=1e-4)


def test_only_blocks_that_differ_are_trained() -> None:
    teacher = tiny()
    x = images(teacher, 64)
    student, plan = started(teacher, x, groups="0,1,2-3", width=0.5)
    assert blocks_of(plan) == [f"blocks.{number}" for number in range(4)]
    assert blocks_of(plan, shared=False) == ["blocks.0", "blocks.1"]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trained = refined(student, teacher, plan, x, how(150, shared=False))
    start = student.state_dict()
    changed = {
        ".".join(name.split(".")[:2]) for name, value in trained.state_dict().items() if not value.equal(start[name])
    }
    assert changed == {"blocks.0", "blocks.1"}
    assert all(value.equal(before[name]) for name, value in teacher.state_dict().items())
    assert blocks_of(planned(teacher, share=1)) == []


def test_equal_seeds_give_equal_bits() -> None:
    teacher = tiny()
    x = images(teacher, 48)
    student, plan = started(teacher, x, share=1, width=0.5)
    first, second, other = (refined(student, teacher, plan, x, how(60, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(value.equal(second[name]) for name, value in first.items())
    assert not all(value.equal(other[name]) for name, value in first.items())


def test_a_block_that_training_makes_worse_keeps_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny()
    x = images(teacher, 48)
    student, plan = started(teacher, x, share=1, width=0.5)
    for lr in (10.0, 1e30):
        monkeypatch.setattr(lessons, "LEARNING_RATE", lr)
        same = refined(student, teacher, plan, x, how(5)).state_dict()
        assert all(value.equal(same[name]) for name, value in student.state_dict().items())


def test_states_of_shared_blocks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of two hold four states at a time if they follow each other, six in turns."""
    teacher = tiny()
    x = images(teacher, 80)
    seen: list[int] = []
    error = lessons.mean_error

    def note(each: list[Lesson]) -> float:
        seen.append(len(each[0].target))
        return error(each)

    monkeypatch.setattr(refine, "mean_error", note)
    for pattern, states in (("sequence", 4), ("cycle", 6)):
        student, plan = started(teacher, x, share=2, pattern=pattern)
        asked = how(1, memory=40 * states * 17 * 24 * 4)
        monkeypatch.setattr(refine, "SINGLE_STATES", 1)  # so that shared blocks decide
        refine_student(student, teacher, plan, x.split(16), asked)
    assert set(seen) == {40}


def test_number_and_memory_limit_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more batches are asked for than are used."""
    teacher = tiny()
    x = images(teacher, 160)
    student, plan = started(teacher, x, share=1, width=0.5)
    seen: list[int] = []
    asked_for: list[int] = []
    monkeypatch.setattr(Training, "run", lambda training, *more: seen.append(training.num_images))

    def batches() -> Iterator[Tensor]:
        for batch in x.split(16):
            asked_for.append(len(batch))
            yield batch

    for limits, count, num_batches in (
        ({"most": 40}, 40, 3),
        ({"memory": 50.0 * SINGLE_STATES * 17 * 24 * 4}, 50, 4),
        ({"memory": 1.0}, 32, 2),
        ({}, 160, 10),
    ):
        seen.clear()
        asked_for.clear()
        refine_student(student, teacher, plan, batches(), how(1, **limits))
        assert seen == [count] * 4
        assert len(asked_for) == num_batches


def test_without_steps_nothing_changes() -> None:
    teacher = tiny()
    x = images(teacher, 4)
    student, plan = started(teacher, x, share=1, width=0.5)
    same = refined(student, teacher, plan, x, how(0)).state_dict()
    assert all(value.equal(same[name]) for name, value in student.state_dict().items())


def test_steps_that_would_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny()
    x = images(teacher, 8)
    student, plan = started(teacher, x, share=1, width=0.5)
    now, taken = [0.0], [0]
    told: list[float] = []
    step = Training._step

    def slow_step(self: Any, factor: float) -> None:
        now[0] += 2.0
        taken[0] += 1
        step(self, factor)

    monkeypatch.setattr(Training, "_step", slow_step)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    refine_student(student, teacher, plan, [x], how(50, seconds=4 * 20.0), told.append)
    assert taken[0] == 4 * 10  # four blocks of 20 seconds, 2 seconds a step
    assert told == sorted(told)
    assert told[-1] == 1
    taken[0] = 0
    refine_student(student, teacher, plan, [x], how(50, seconds=0.0))
    assert taken[0] == 4 * TIMED_STEPS
