"""Build the students of the most promising candidates, and measure how well they start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from vitcompress.runtime.shares import part_of
from vitcompress.search.candidates import Candidate
from vitcompress.search.divergence import divergence
from vitcompress.search.model import Search
from vitcompress.search.student import build_student

MAX_BUILT = 3
SURE = 1.3
"""A plan whose predicted cost is so many times the best one's is not built."""


def build_best(
    candidates: Sequence[Candidate], search: Search, tell: Callable[[float], None]
) -> tuple[list[Candidate], nn.Module]:
    """Build the candidates that may be the best.

    Args:
        candidates: cheapest first, at least one.
        search: what the search works on.
        tell: called with the share of this that is done, 0–1.

    Returns:
        All candidates, best first, those that were built before the others; and the student of the
        first.
    """
    likely = [c for c in candidates[:MAX_BUILT] if c.predicted <= SURE * candidates[0].predicted]
    built: list[Candidate] = []
    best = search.teacher
    for number, candidate in enumerate(likely):
        part = part_of(tell, number / len(likely), (number + 0.99) / len(likely))
        student = build_student(candidate.plan, search.teacher, search.fitted, part, search.weights)
        measured = divergence(student, search.teacher, search.judged)
        best = student if all(measured < other.measured for other in built) else best
        built.append(replace(candidate, measured=measured))
        tell((number + 1) / len(likely))
    return sorted(built, key=lambda candidate: candidate.measured) + list(candidates[len(likely) :]), best
