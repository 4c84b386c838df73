"""Errors caused by the user: a message that names the flag, file or tensor, and a hint."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

# characters that control a terminal: escapes, and marks that change the direction of text
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MAX_LETTERS = 20_000  # of a message
_P = ParamSpec("_P")
_T = TypeVar("_T")


class VitcompressError(Exception):
    """A user's mistake.

    Args:
        message: names the flag, file or tensor, and what is wrong.
        hint: what to do next; empty where the message is enough.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class RecipeError(VitcompressError):
    """A wrong option or recipe file."""


class ModelError(VitcompressError):
    """A model that is unknown, ambiguous or of no supported family."""


class CheckpointError(VitcompressError):
    """Weights that are missing, unreadable or made for another model."""


class PlanError(VitcompressError):
    """A plan that the model does not allow."""


class DataError(VitcompressError):
    """Images or labels that cannot be used."""


class TrainingError(VitcompressError):
    """Training cannot continue."""


class ArtifactError(VitcompressError):
    """A file that is not a complete vitcompress artifact."""


class ExportError(Exception):
    """An exported file that differs from its artifact: a bug, not a user's mistake."""


def raise_faults(kind: type[VitcompressError], faults: Iterable[tuple[str, str]]) -> None:
    """Raise all faults as one error; do nothing where there are none.

    Args:
        kind: the error to raise.
        faults: `(message, hint)` pairs.

    Raises:
        VitcompressError: of `kind`, with one line per fault.
    """
    pairs = list(faults)
    if pairs:
        hints = dict.fromkeys(hint for _, hint in pairs if hint)  # each hint once, in order
        raise kind("\n".join(message for message, _ in pairs), hint=" ".join(hints))


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
        """Return `step(*args, **kwargs)`; None where it raises a mistake, which is collected."""
        try:
            return step(*args, **kwargs)
        except VitcompressError as error:
            self.add(str(error), error.hint)
            return None

    def raise_as(self, kind: type[VitcompressError]) -> None:
        """Raise all faults as one error, like `raise_faults`."""
        raise_faults(kind, self._faults)


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the error's type where it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Return text that is safe to print: without control characters, of bounded length."""
    shown = text if len(text) <= _MAX_LETTERS else f"{text[:_MAX_LETTERS]}…"
    return _CONTROLS.sub("?", shown)


def shorten(names: Iterable[str], *, limit: int = 8) -> str:
    """Join the first `limit` names for a message, with a count of the rest."""
    all_names = list(names)
    rest = f", … ({len(all_names) - limit} more)" if len(all_names) > limit else ""
    return ", ".join(all_names[:limit]) + rest


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean …?)` with the most similar known word; empty where none is similar."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
