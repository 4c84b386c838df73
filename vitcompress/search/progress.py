"""Keep the state of a measurement that is interrupted, and go on from it.

    for each context, for some blocks at a time:
        moments of some images   →   changes   →   scores on some other images

The context and changes are computed again: that takes less time than writing them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors.torch import save_file
from torch import Tensor

import vitcompress
from vitcompress.artifact.atomic import replacing
from vitcompress.artifact.tensorfile import TensorFile, open_tensors, strict_json
from vitcompress.errors import ArtifactError, RecipeError
from vitcompress.initialize.regression import Moments, wide
from vitcompress.plans.bounds import Amount, Block, Count
from vitcompress.recipe.differences import describe_differences
from vitcompress.runtime.signals import TerminationError, deferring

VERSION = 1

BlockMoments = dict[str, dict[str, Moments]]
"""Moments by block and by layer inside it."""


class Part(NamedTuple):
    """Blocks that are measured together.

    Attributes:
        context: number of the context.
        blocks: their names.
    """

    context: int
    blocks: tuple[str, ...]


@dataclass
class State:
    """What is measured so far.

    Attributes:
        parts: one after the other, those of one context together.
        scores: as `add_scores` fills them, by context.
        contexts: parameters and nats of the contexts that are made.
        part: number of the part under way; the number of parts where all are measured.
        num_fitted: number of images in the moments of this part.
        num_judged: number of images in the scores of this part.
        moments: of this part.
        generator: state of the random directions after `num_judged` images; None before the first.
        is_whole: whether the numbers above agree with the tensors.
    """

    parts: Sequence[Part]
    scores: Sequence[Tensor]
    contexts: list[tuple[int, float]] = field(default_factory=list)
    part: int = 0
    num_fitted: int = 0
    num_judged: int = 0
    moments: BlockMoments = field(default_factory=lambda: defaultdict(lambda: defaultdict(Moments)))
    generator: Tensor | None = None
    is_whole: bool = True

    @property
    def blocks(self) -> Sequence[str]:
        """Names of the blocks of the part under way."""
        return self.parts[self.part].blocks

    @property
    def context(self) -> int:
        """Number of the context under way; the number of contexts where all are measured."""
        return self.parts[self.part].context if self.part < len(self.parts) else len(self.scores)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM wait until a change of the state is complete."""
        with deferring(ctrl_c=True):
            self.is_whole = False
            yield
            self.is_whole = True

    def finish_part(self) -> None:
        """Go on to the next part, in place."""
        with self.step():
            self.part, self.num_fitted, self.num_judged, self.generator = self.part + 1, 0, 0, None
            self.moments.clear()


@dataclass(frozen=True)
class Progress:
    """Where the state of a measurement is kept.

    Attributes:
        path: a safetensors file; its folder is made where it does not exist.
        facts: what must be equal when the measurement goes on.
        resume: go on from the file, if there is one.
        say: shows a message to the user.
    """

    path: Path
    facts: Mapping[str, Any]
    resume: bool
    say: Callable[[str], None]

    def resumed(self, start: State, device: torch.device) -> State:
        """Return the state to go on from: the kept one, or the start.

        Args:
            start: a state in which nothing is measured yet.
            device: of the images.

        Raises:
            RecipeError: the file is of another measurement; lists every difference.
            ArtifactError: the file cannot be read.
        """
        if not self.resume or not self.path.exists():
            return start
        state = _read(self.path, self.facts, start, device)
        self.say(f"continuing the measurement from {self.path}")
        return state

    @contextmanager
    def keeping(self, state: State) -> Iterator[None]:
        """Write the state when the context is interrupted, and say where it is."""
        try:
            yield
        except (KeyboardInterrupt, TerminationError) as error:
            if not state.is_whole or (state.part, state.num_fitted) == (0, 0):
                raise
            _write(self.path, self.facts, state)
            message = f"What was measured is in {self.path}: the same command with --resume continues from there."
            raise type(error)(message) from error


@dataclass(frozen=True)
class _Header:
    """The state as JSON, without its tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: Literal["vitcompress measurement"]
    version: int
    facts: dict[str, Any]
    parts: Annotated[tuple[tuple[Count, tuple[Block, ...]], ...], Field(min_length=1)]
    contexts: tuple[tuple[Count, Amount], ...]
    part: Count
    num_fitted: Count
    num_judged: Count


_HEADER = TypeAdapter(_Header)


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts as JSON gives them back, with the version of this package."""
    tree: dict[str, Any] = json.loads(json.dumps({**facts, "vitcompress": vitcompress.__version__}))
    return tree


def _write(path: Path, facts: Mapping[str, Any], state: State) -> None:
    """Write a state, whole or not at all.

    Raises:
        ArtifactError: it cannot be written.
    """
    header = _Header(
        "vitcompress measurement", VERSION, _facts(facts), tuple(state.parts), tuple(state.contexts), state.part,
        state.num_fitted, state.num_judged,
    )  # fmt: skip
    tensors = {f"scores/{number}": scores for number, scores in enumerate(state.scores)}
    if state.generator is not None:
        tensors["generator"] = state.generator
    for block, layers in state.moments.items():
        for layer, moments in layers.items():
            assert moments.origin is not None  # there are samples
            tensors |= {
                f"{block}/{layer}/count": torch.as_tensor(moments.count, dtype=torch.double),
                f"{block}/{layer}/x": moments.x,
                f"{block}/{layer}/xx": moments.xx,
                f"{block}/{layer}/origin": moments.origin[0],
            }
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        metadata = {"state": _HEADER.dump_json(header).decode()}
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)


def kept_facts(path: Path) -> Mapping[str, Any]:
    """Return what the measurement whose state is in a file depends on.

    Raises:
        ArtifactError: the file cannot be read.
    """
    with open_tensors(path) as file:
        return _HEADER.validate_python(strict_json(file.metadata.get("state", ""))).facts


def _read(path: Path, facts: Mapping[str, Any], start: State, device: torch.device) -> State:
    """Read a state that `_write` wrote.

    Raises:
        RecipeError: it is of another measurement.
        ArtifactError: it cannot be read.
    """
    hint = "Leave out --resume to start over."
    try:
        with open_tensors(path) as file:
            header = _HEADER.validate_python(strict_json(file.metadata.get("state", "")))
            lines = describe_differences(header.facts, _facts(facts))
            if lines:
                message = f"--resume: the measurement in {path} differs from this one."
                raise RecipeError("\n".join((message, *lines)), hint=f"Use the same options. {hint}")
            return _state(file, header, start, device)
    except KeyError as error:
        raise ArtifactError(f"--resume: {path} cannot be read: it lacks {error}.", hint=hint) from error
    except ArtifactError as error:
        raise ArtifactError(f"--resume: {error}", hint=hint) from error


def _state(file: TensorFile, header: _Header, start: State, device: torch.device) -> State:
    """Return the state in a file; the start says what it has to fit.

    Raises:
        ValueError: it does not fit.
    """
    parts = [Part(*part) for part in header.parts]
    blocks = [[(context, block) for context, names in every for block in names] for every in (parts, start.parts)]
    if header.version != VERSION or blocks[0] != blocks[1]:
        raise ValueError("it is of another version or of other blocks")
    if header.part > len(parts) or (header.part == len(parts) and header.num_fitted):
        raise ValueError(f"it has no part {header.part}")
    scores = [file.tensor(f"scores/{number}") for number in range(len(start.scores))]
    if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(scores, start.scores, strict=True)):
        raise ValueError("it is of other options or images")
    on_device = [tensor.to(device) for tensor in scores]
    state = State(parts, on_device, list(header.contexts), header.part, header.num_fitted, header.num_judged)
    if len(state.contexts) < min(state.context + bool(header.num_fitted), len(scores)):
        raise ValueError("it lacks what a context costs")
    state.generator = file.tensor("generator") if "generator" in file.places else None
    if header.num_judged and state.generator is None:
        raise ValueError("it has no random state")
    wide_device = wide(torch.zeros((), device=device)).device
    for name in [name.removesuffix("/count") for name in file.places if name.endswith("/count")]:
        block, layer = name.split("/")
        x, xx, origin = (file.tensor(f"{name}/{key}") for key in ("x", "xx", "origin"))
        if block not in state.blocks or not (x.shape == origin.shape == xx.shape[:1] == xx.shape[1:]):
            raise ValueError(f"{name} is not of this part, or its shapes do not agree")
        state.moments[block][layer] = Moments(
            file.tensor(f"{name}/count").to(wide_device), x.to(wide_device), xx=xx.to(wide_device),
            origin=(origin.to(device), torch.zeros((), dtype=torch.double)),
        )  # fmt: skip
    if header.num_fitted and set(state.moments) != set(state.blocks):
        raise ValueError("the moments of a block are missing")
    return state
