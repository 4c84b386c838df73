"""Take off the names of a state dict what training scripts put in front of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor

from vitcompress.errors import CheckpointError, shorten
from vitcompress.pretrained.weights_file import is_plain

State = Mapping[str, Tensor]

_MIN_COVERED = 0.5  # share of the tensors under the best prefix that makes another one a rival
_WRAPPERS = re.compile(
    r"(_orig_mod|module|model|net|network|backbone|encoder|base_encoder|student|teacher|_forward_module|base_model)\."
)  # prefixes that can be taken off where all names have them
_INFIXES = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def bare_names(state: State, expected: Collection[str], what: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return a state under the names of a model, and what was taken off, in clauses.

    Args:
        state: tensors by name.
        expected: names of the model's tensors.
        what: the flag and the file, at the start of messages.

    Raises:
        CheckpointError: several prefixes fit, and the tensors under them differ; or two names
            become one.
    """
    state, infixes = _without_infixes(state, what)
    prefix, copies = _prefix(state, expected, what)
    notes = (
        *((f"{shorten(infixes)} was taken out of the names.",) if infixes else ()),
        *((f"the prefix {prefix} was taken off the names.",) if prefix else ()),
    )
    return _without(state, prefix, copies, what), notes


def suffixes(names: Collection[str]) -> set[str]:
    """Return names with and without their first parts: of a.b.c, also b.c and c."""
    all_parts = [_INFIXES.sub("", name).split(".") for name in names]
    return {".".join(parts[i:]) for parts in all_parts for i in range(len(parts))}


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same shape and values, NaN included."""
    if not (is_plain(one) and is_plain(other) and one.shape == other.shape):
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _without_infixes(state: State, what: str) -> tuple[State, list[str]]:
    """Take out of names what torch puts where single blocks are wrapped; also return it.

    Raises:
        CheckpointError: two names become one.
    """
    new = {name: _INFIXES.sub("", name) for name in state}
    if len(set(new.values())) < len(new):
        raise CheckpointError(f"{what} holds the same names with and without wrapped blocks.", hint="Save only one.")
    infixes = {match[1] for name in state for match in _INFIXES.finditer(name)}
    return {new[name]: t for name, t in state.items()}, sorted(infixes)


def _prefix(state: State, expected: Collection[str], what: str) -> tuple[str, list[str]]:
    """Return the prefix, with its dot, under which a state has a model's names; empty for none.

    The second value lists prefixes of equal copies of the same tensors.

    Raises:
        CheckpointError: several prefixes fit, and the tensors under them differ.
    """
    votes: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in expected:
                votes["".join(f"{part}." for part in parts[:i])] += 1
    most = max(votes.values(), default=0)
    if most < max(2, _MIN_COVERED * min(len(expected), len(state)) / 2):
        return _shared_wrapper(state), []  # names of another publisher
    rivals = [prefix for prefix, count in votes.items() if count >= _MIN_COVERED * most]
    best = max(rivals, key=lambda prefix: votes[prefix])
    under = {p: {name[len(p) :]: t for name, t in state.items() if name.startswith(p)} for p in rivals}
    differing = [
        p for p in rivals
        if p != best and any(name in under[best] and not same_tensor(under[best][name], under[p][name])
               for name in under[p] if name in expected)
    ]  # fmt: skip
    if differing:
        flags = " or ".join(f"--checkpoint-key {p.rstrip('.')}" for p in rivals if p)
        names = shorten(p or "names without a prefix" for p in rivals)
        raise CheckpointError(f"{what} holds several models that differ: {names}.", hint=f"Choose one: {flags}.")
    return best, [p for p in rivals if p != best and under[p].keys() <= under[best].keys()]


def _shared_wrapper(names: Collection[str]) -> str:
    """Return the known prefixes that all names have, like `module.model.`; empty for none."""
    first, taken = next(iter(names)), ""
    while match := _WRAPPERS.match(first, len(taken)):
        if not all(name.startswith(match[0], len(taken)) for name in names):
            break
        taken += match[0]
    return taken


def _without(state: State, prefix: str, copies: Collection[str], what: str) -> dict[str, Tensor]:
    """Return a state without a prefix and without copies; other names stay as they are.

    Raises:
        CheckpointError: two names become one.
    """
    tensors: dict[str, Tensor] = {}
    for name, t in state.items():
        if any(copy and name.startswith(copy) for copy in copies):
            continue
        new = name.removeprefix(prefix)
        if new in tensors:
            raise CheckpointError(f"{what} holds {new} twice, once under {prefix.rstrip('.')}.", hint="Save only one.")
        tensors[new] = t
    return tensors
