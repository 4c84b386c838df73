"""Pair blocks of the student with blocks of the teacher.

--layers 1,3,5:9     student blocks  0 1 2 3 4 5      1 is short for 1:1
                                       │   │   └──────────┐
                     teacher blocks  0 1 2 3 4 5 6 7 8 9 10 11
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vitcompress.errors import RecipeError, raise_faults


def pair_layers(
    text: str | None, student_stages: Sequence[str], teacher_stages: Sequence[str]
) -> list[tuple[int, int]]:
    """Return which block of the student learns from which block of the teacher.

    Args:
        text: `1,3,5:9`, student block or student:teacher, counted from 0; None for every block.
        student_stages: stage of each block of the student.
        teacher_stages: stage of each block of the teacher.

    Returns:
        `(student block, teacher block)` pairs, in the order of `text` or of the student's blocks.

    Raises:
        RecipeError: `text` has another form or names a block that does not exist; lists every
            fault.

    Source: without `text`, the k-th of n student blocks learns from teacher block m·k/n of m, stage
        by stage, as in MiniViT's scripts: blocks 1, 3, 5, 7, 9, 11 of Swin-T's 12 learn from 1, 3,
        9, 15, 21, 23 of a teacher's 24.
    """
    if text is None:
        return _spread(student_stages, teacher_stages)
    faults: list[str] = []
    pairs: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", part)
        if match is None:
            faults.append(f"{part.strip()!r} is not of the form STUDENT or STUDENT:TEACHER")
            continue
        pair = int(match[1]), int(match[2] or match[1])
        for number, stages, who in zip(pair, (student_stages, teacher_stages), ("student", "teacher"), strict=True):
            if number >= len(stages):
                faults.append(f"{part.strip()} goes past the {who}'s last block, {len(stages) - 1}")
        if pair[0] in [first for first, _ in pairs]:
            faults.append(f"student block {pair[0]} comes twice")
        pairs.append(pair)
    raise_faults(
        RecipeError, [(f"--layers {text}: {fault}.", "Blocks count from 0, as in 1:1,3:9.") for fault in faults]
    )
    return pairs


def _spread(student_stages: Sequence[str], teacher_stages: Sequence[str]) -> list[tuple[int, int]]:
    """Pair every student block, spread evenly over the teacher's blocks of the same stage."""
    if list(dict.fromkeys(student_stages)) != list(dict.fromkeys(teacher_stages)):  # stages differ: treat as one
        student_stages, teacher_stages = [""] * len(student_stages), [""] * len(teacher_stages)
    pairs = []
    for stage in dict.fromkeys(student_stages):
        students = [number for number, other in enumerate(student_stages) if other == stage]
        teachers = [number for number, other in enumerate(teacher_stages) if other == stage]
        pairs += [
            (block, teachers[-(-(k + 1) * len(teachers) // len(students)) - 1])  # rounded up: never before the first
            for k, block in enumerate(students)
        ]
    return pairs
