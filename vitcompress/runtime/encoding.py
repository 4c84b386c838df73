"""Write text to streams that cannot encode all of it: similar characters replace the rest."""

from __future__ import annotations

import codecs
import io
import unicodedata
from typing import IO

_SIMILAR = {
    "×": "x", "·": "*", "•": "*", "–": "-", "—": "-", "‑": "-", "−": "-", "…": "...", "→": "->", "←": "<-",
    "⇒": "=>", "≤": "<=", "≥": ">=", "≈": "~", "±": "+-", "√": "sqrt", "Σ": "sum", "‖": "||", "“": '"', "”": '"',
    "„": '"', "‘": "'", "’": "'", "«": '"', "»": '"', "µ": "u", "°": " degrees", "►": ">", "╲": "\\",
}  # fmt: skip
_BOX_LINES = {"HORIZONTAL": "-", "VERTICAL": "|"}  # by the word that a box character's name has alone
_HANDLER = "vitcompress.similar"


def encode_what_can_be(*streams: IO[str] | None) -> None:
    """Let streams replace what they cannot encode instead of raising an error."""
    codecs.register_error(_HANDLER, _similar)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and not _keeps_bytes(stream):
            stream.reconfigure(errors=_HANDLER)


def encodes(stream: IO[str], text: str) -> bool:
    """Return whether a stream can encode a text."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _keeps_bytes(stream: io.TextIOWrapper) -> bool:
    """Return whether a stream writes every character, and file names byte by byte."""
    return stream.errors == "surrogateescape" and stream.encoding.lower().replace("-", "") == "utf8"


def _similar(error: UnicodeError) -> tuple[str, int]:
    """Return a replacement in ASCII of what cannot be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    if character in _SIMILAR:
        return _SIMILAR[character]
    name = unicodedata.name(character, "")
    if name.startswith("BOX DRAWINGS"):
        directions = [line for word, line in _BOX_LINES.items() if word in name]
        return directions[0] if len(directions) == 1 and " AND " not in name else "+"
    if name.endswith((" BLOCK", " SHADE")):
        return "#"
    if character.isalpha():  # a file name with other letters would be another name
        return "?"
    return unicodedata.normalize("NFKD", character).replace("\u2044", "/").encode("ascii", "ignore").decode() or "?"
