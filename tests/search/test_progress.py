"""A measurement that is interrupted goes on to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.factories import images, tiny
from tests.search.factories import ROOMY
from vitcompress.errors import ArtifactError, RecipeError, VitcompressError
from vitcompress.families.registry import family_of
from vitcompress.search.measure import measure_options
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.options import Shapes
from vitcompress.search.progress import Progress, State

FACTS = {"model.sha256": "abc", "--width-multiple": 8}
EVERY_BLOCK_ALONE, ALL_TOGETHER = 1.0, 1e12


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny(**{**ROOMY, "depth": 3})


def nothing(text: str) -> None:
    pass


def measure(
    model: nn.Module, kinds: tuple[str, ...], memory: float, keep: Progress | None,
    tell: Callable[[float], None] = lambda done: None,
) -> MeasuredOptions:  # fmt: skip
    family = family_of(model, "tiny")
    shapes = Shapes(model, family, family.block_names(model), kinds, (), 3)
    noise = images(model, 60)  # a chunk of 20 to fit to, two of 40 to judge on
    return measure_options(shapes, noise[:40], noise[40:], memory, tell, keep)


def interrupting(after: int, *, context: int = 3) -> Callable[[float], None]:
    """Return a `tell` that is interrupted at its n-th call after those that tell of the context."""
    told: list[float] = []

    def tell(done: float) -> None:
        told.append(done)
        if len(told) == context + after:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize(
    ("kinds", "memory", "after"),
    [
        (("narrow", "skip"), EVERY_BLOCK_ALONE, 5),  # after the first chunk to fit to … (two calls come before it)
        (("narrow", "skip"), EVERY_BLOCK_ALONE, 9),
        (("narrow", "skip"), EVERY_BLOCK_ALONE, 12),
        (("narrow", "share", "low_rank"), ALL_TOGETHER, 3),
        (("narrow", "share", "low_rank"), ALL_TOGETHER, 5),
        (("narrow", "share", "low_rank"), ALL_TOGETHER, 7),  # after the first chunk to judge on
    ],
)
def test_an_interrupted_measurement_goes_on_to_the_same_bits(
    model: nn.Module, kinds: tuple[str, ...], memory: float, after: int, tmp_path: Path
) -> None:
    whole = measure(model, kinds, memory, None)
    path = tmp_path / "new" / "options.json.part"
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt, match=r"options\.json\.part: the same command with --resume"):
        measure(model, kinds, memory, Progress(path, FACTS, False, nothing), interrupting(after))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    told: list[float] = []
    resumed = measure(model, kinds, ALL_TOGETHER, Progress(path, FACTS, True, said.append), told.append)
    assert said == [f"continuing the measurement from {path}"]
    assert told[4] > told[2]  # after the context; what is done is not done again
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    assert [o.group for o in resumed.options] == [o.group for o in whole.options]
    assert resumed.levels == whole.levels


def test_a_measurement_that_is_interrupted_at_its_end_is_whole(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, finish_part = tmp_path / "part", State.finish_part

    def interrupted(state: State) -> None:
        finish_part(state)
        if state.part == len(state.parts):
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "finish_part", interrupted)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        measure(model, ("narrow",), EVERY_BLOCK_ALONE, Progress(path, FACTS, False, nothing))
    monkeypatch.setattr(State, "finish_part", finish_part)
    told: list[float] = []
    resumed = measure(model, ("narrow",), EVERY_BLOCK_ALONE, Progress(path, FACTS, True, nothing), told.append)
    assert told == [pytest.approx(1.0)]
    whole = measure(model, ("narrow",), EVERY_BLOCK_ALONE, None)
    assert [o.group for o in resumed.options] == [o.group for o in whole.options]
    assert resumed.levels == whole.levels


def test_before_anything_is_measured_nothing_is_kept(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        measure(model, ("skip",), ALL_TOGETHER, Progress(path, FACTS, False, nothing), interrupting(1, context=0))
    assert not path.exists()


def test_without_a_file_a_measurement_starts_at_its_beginning(model: nn.Module, tmp_path: Path) -> None:
    told: list[float] = []
    measure(model, ("skip",), ALL_TOGETHER, Progress(tmp_path / "part", FACTS, True, nothing), told.append)
    assert told[0] == told[1] == 0


@pytest.fixture
def part(model: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        measure(model, ("narrow",), ALL_TOGETHER, Progress(path, FACTS, False, nothing), interrupting(4))
    return path


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({**FACTS, "model.sha256": "def"}, "model.sha256: def, was abc"),
        ({**FACTS, "--width-multiple": 1}, "--width-multiple: 1, was 8"),
    ],
)
def test_another_measurement_is_refused_with_what_differs(
    facts: dict[str, Any], line: str, model: nn.Module, part: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        measure(model, ("narrow",), ALL_TOGETHER, Progress(part, facts, True, nothing))
    assert line in str(caught.value)
    assert "model.sha256" in str(caught.value) or "--width-multiple" in str(caught.value)


def test_a_state_of_other_options_or_blocks_is_refused(model: nn.Module, part: Path) -> None:
    with pytest.raises(ArtifactError, match="of other options"):
        measure(model, ("low_rank",), ALL_TOGETHER, Progress(part, FACTS, True, nothing))
    with pytest.raises(ArtifactError, match="of other blocks"):  # in fewer contexts
        measure(model, ("skip",), ALL_TOGETHER, Progress(part, FACTS, True, nothing))
    with pytest.raises(ArtifactError, match="of other blocks"):
        measure(tiny(**ROOMY), ("narrow",), ALL_TOGETHER, Progress(part, FACTS, True, nothing))


def test_a_cut_file_is_refused(model: nn.Module, part: Path) -> None:
    data = part.read_bytes()
    for length in (0, 5, len(data) // 2, len(data) - 1):
        part.write_bytes(data[:length])
        with pytest.raises(VitcompressError, match="cannot be read"):
            measure(model, ("narrow",), ALL_TOGETHER, Progress(part, FACTS, True, nothing))
