"""What can a user do wrong?  Every answer is a message that names the flag, file or tensor, and a hint."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

# what a terminal obeys: escapes, and marks that turn the direction of text
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MAX_LETTERS = 20_000  # of a message
_P = ParamSpec("_P")
_T = TypeVar("_T")


class VitcompressError(Exception):
    """A user's mistake.

    Args:
        message: what is wrong, naming the flag, file or tensor.
        hint: what to do next; empty where the message says it all.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class RecipeError(VitcompressError):
    """An option or a recipe file that cannot be followed."""


class ModelError(VitcompressError):
    """A model that is unknown, ambiguous or of no family we can compress."""


class CheckpointError(VitcompressError):
    """Weights that are missing, unreadable or of another model."""


class PlanError(VitcompressError):
    """Groups of blocks that cannot share."""


class DataError(VitcompressError):
    """Images or labels that cannot be used."""


class TrainingError(VitcompressError):
    """A training run that cannot go on."""


class ArtifactError(VitcompressError):
    """A file that is not, or is no longer, a whole vitcompress artifact."""


class ExportError(Exception):
    """What was written is not what it was written from: a fault of ours or of an exporter, and not the user's."""


def raise_faults(kind: type[VitcompressError], faults: Iterable[tuple[str, str]]) -> None:
    """Raise all faults as one error; do nothing where there are none.

    Args:
        kind: the error to raise.
        faults: `(message, hint)` pairs.

    Raises:
        VitcompressError: of `kind`, with one line per fault.
    """
    found = list(faults)
    if found:
        hints = dict.fromkeys(hint for _, hint in found if hint)  # each hint once, in order
        raise kind("\n".join(message for message, _ in found), hint=" ".join(hints))


class Faults:
    """Collects user mistakes, so that all of them are reported at once."""

    def __init__(self) -> None:
        self._faults: list[tuple[str, str]] = []

    def add(self, message: str, hint: str = "") -> None:
        """Add one fault."""
        self._faults.append((message, hint))

    def extend(self, faults: Iterable[tuple[str, str]]) -> None:
        """Add faults given as `(message, hint)` pairs."""
        self._faults.extend(faults)

    def attempt(self, step: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        """Return `step(*args, **kwargs)`; None where it raises a user mistake, which is added to the faults."""
        try:
            return step(*args, **kwargs)
        except VitcompressError as error:
            self.add(str(error), error.hint)
            return None

    def raise_as(self, kind: type[VitcompressError]) -> None:
        """Raise all faults as one error; do nothing where there are none.

        Args:
            kind: the error to raise.

        Raises:
            VitcompressError: of `kind`, with one line per fault.
        """
        raise_faults(kind, self._faults)


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Text for a terminal: names from files may hold what it would obey, or be endless."""
    shown = text if len(text) <= _MAX_LETTERS else f"{text[:_MAX_LETTERS]}…"
    return _OBEYED.sub("?", shown)


def shorten(names: Iterable[str], *, limit: int = 8) -> str:
    """Join names for a message, the first `limit` of them and a count of the rest."""
    every = list(names)
    rest = f", … ({len(every) - limit} more)" if len(every) > limit else ""
    return ", ".join(every[:limit]) + rest


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean …?)` with the known word that is most like `word`; empty where none is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
