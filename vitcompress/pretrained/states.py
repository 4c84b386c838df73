"""Choose one state dict of those that a checkpoint holds.

file ── read_tree ──► tree ── choose ──► one state dict ── bare_names ──► names of a model
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcompress.errors import CheckpointError, shorten
from vitcompress.pretrained.prefixes import State, bare_names, same_tensor, suffixes
from vitcompress.pretrained.weights_file import Tree, check_tensors, is_plain, read_tree

_MAX_DEPTH = 5  # of nested keys
_MIN_COVERED = 0.5  # share of the model's tensors, or of the largest state's, that makes a state plausible
_MIN_FOLLOWED = 0.5  # an average that went less than this share of the weights' way has not followed them
_BESIDE = re.compile(
    r"optim.*|.*optimizer.*|.*sched.*|.*scaler.*|amp|rng.*|.*_rng|callbacks?|loops|loss.*|criterion.*|"
    r"hyper_parameters|args|config|cfg|.*meter.*"
)  # keys of what training keeps beside the weights
_AVERAGE = re.compile(r"(^|[_.])ema([_.\d]|$)|(^|[_.])swa([_.]|$)|(^|[_.])(avg|averaged?)([_.]|$)")


@dataclass(frozen=True)
class Weights:
    """Tensors of one state dict, under names as a model has them.

    Attributes:
        tensors: by name.
        notes: which state was taken and what was unwrapped, in clauses that end with a period.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_weights(path: Path, expected: Collection[str] = (), *, key: str | None = None, what: str = "") -> Weights:
    """Return the state dict in a checkpoint; runs no code in the file.

    Args:
        path: a file that safetensors or torch wrote, or the index of its shards.
        expected: names of the model's tensors, which tell states and prefixes apart.
        key: dotted key of the state, or prefix of its names; None to find it.
        what: the flag and the file, at the start of messages; by default those of `--checkpoint`.

    Raises:
        CheckpointError: the file is unreadable, holds no plain tensors, or holds several states
            and it is not clear which to take.
    """
    what = what or f"--checkpoint {path}"
    weights = find_weights(read_tree(path, what), expected, key=key, what=what)
    check_tensors(weights.tensors, path, what)
    return weights


def find_weights(tree: Tree, expected: Collection[str], *, key: str | None = None, what: str) -> Weights:
    """Return the state dict in what a checkpoint holds; see `read_weights`.

    Raises:
        CheckpointError: there is none, or several and it is not clear which to take.
    """
    states = dict(_states(tree))
    if not states:
        raise CheckpointError(f"{what} holds no named tensors.", hint="Save only the state dict.")
    if key is not None:
        state = _named(states, key, what)
        notes: tuple[str, ...] = (f"the weights under {key} were taken.",)
    else:
        name, notes = _choose(states, expected, what)
        state = states[name]
    tensors, more_notes = bare_names(state, expected, what)
    return Weights(tensors, (*notes, *more_notes))


def _states(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the mappings of names to tensors in a tree, by dotted key."""
    if not isinstance(tree, Mapping) or len(path) > _MAX_DEPTH:
        return
    tensors = {name: t for name, t in tree.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if tensors:
        yield ".".join(path), tensors
    for name, subtree in tree.items():
        if isinstance(name, str):
            yield from _states(subtree, (*path, name))


def _named(states: Mapping[str, State], key: str, what: str) -> State:
    """Return the state under a key, or the tensors of a state whose names start with it.

    Raises:
        CheckpointError: there is none; the hint lists the keys.
    """
    if key in states:
        return states[key]
    below = [name for name in states if name.startswith(f"{key}.")]
    if len(below) == 1:
        return states[below[0]]
    found = [
        {inner[len(rest) :]: t for inner, t in state.items() if inner.startswith(rest)}
        for name, state in states.items()
        for rest in [f"{key[len(name) + 1 :] if name else key}."]
        if not name or key.startswith(f"{name}.")
    ]
    found = [state for state in found if state]
    if len(found) == 1:
        return found[0]
    raise CheckpointError(f"{what}: there are no weights under {key!r}.", hint=f"It has {_keys(states)}.")


def _keys(states: Mapping[str, State]) -> str:
    """List the keys of states, largest first, for a hint."""
    if list(states) == [""]:
        starts = Counter(name.partition(".")[0] for name in states[""])
        return f"no keys; its names start with {shorten(name for name, _ in starts.most_common())}"
    names = sorted(states, key=lambda name: -len(states[name]))
    counts = {name: len(states[name]) for name in names}
    return shorten(f"{name or 'the top level'} ({n} tensor{'s' if n > 1 else ''})" for name, n in counts.items())


def _choose(states: Mapping[str, State], expected: Collection[str], what: str) -> tuple[str, tuple[str, ...]]:
    """Return the key of the state to take, and what to say about it.

    Of weights and their moving average, the average is taken, as timm does.

    Raises:
        CheckpointError: several states fit and differ, and none is to be preferred.
    """
    plausible = _plausible(states, expected)
    if len(plausible) == 1:
        name = plausible[0]
        return name, (f"the weights under {name} were taken.",) if name else ()
    bare = {name: _bare(states[name], expected, what) for name in plausible}
    if all(_equal(bare[plausible[0]], bare[other]) for other in plausible[1:]):
        return plausible[0], (f"{shorten(plausible)} are equal; {plausible[0]} was taken.",)
    averages = [name for name in plausible if _AVERAGE.search(name.lower())]
    flags = " or ".join(f"--checkpoint-key {name}" for name in plausible if name)
    if len(plausible) == 2 and len(averages) == 1:
        average, other = averages[0], next(name for name in plausible if name not in averages)
        if _lag(bare[average], bare[other]) < _MIN_FOLLOWED:
            raise CheckpointError(
                f"{what} holds {other or 'weights'} and their moving average {average}, which has hardly followed "
                "them: its biases, norms or head are near where training starts.",
                hint=f"Choose one: {flags}.",
            )
        note = f"{average} was taken, the moving average of {other or 'the weights'}, as timm does."
        return average, (f"{note} --checkpoint-key {other} takes the other." if other else note,)
    raise CheckpointError(
        f"{what} holds several states that differ: {shorten(name or 'the top level' for name in plausible)}.",
        hint=f"Choose one: {flags}.",
    )


def _plausible(states: Mapping[str, State], expected: Collection[str]) -> list[str]:
    """Return the keys of the states that can be the model's weights."""
    names = [name for name in states if not any(_BESIDE.fullmatch(key.lower()) for key in name.split("."))]
    names = names or list(states)
    covered = {name: len(set(expected) & suffixes(states[name])) for name in names}
    fitting = [name for name in names if covered[name] >= max(1, _MIN_COVERED * len(expected))] if expected else []
    if fitting:
        return [name for name in fitting if covered[name] >= _MIN_COVERED * max(covered.values())]
    largest = max(len(states[name]) for name in names)
    return [name for name in names if len(states[name]) >= _MIN_COVERED * largest]


def _bare(state: State, expected: Collection[str], what: str) -> State:
    """Return the model's tensors in a state, without the prefix of their names."""
    tensors, _ = bare_names(state, expected, what)
    return {name: t for name, t in tensors.items() if name in expected} or tensors


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(same_tensor(one[name], other[name]) for name in one)


def _lag(average: State, weights: State) -> float:
    """Return how far an average moved from the start of training, as a share of its weights' way.

    Biases start at zero and weights of norms at one. A new head is looked at alone too: in
    fine-tuning, all else starts from pretrained weights. Its matrix is compared by the angle.
    """
    lags = [
        float(torch.cosine_similarity(average[name].double().flatten(), t.double().flatten(), dim=0))
        for name, t in weights.items()
        if re.search(r"(^|\.)(head|fc|classifier)\.weight$", name)
        and all(is_plain(one) and one.shape == t.shape for one in (t, average.get(name, t[:0])))
    ]
    for only in (r"", r"(^|\.)(head|fc|classifier)(\.|_)"):
        moved = [0.0, 0.0]
        for name, t in weights.items():
            is_vector = is_plain(t) and t.ndim == 1 and t.is_floating_point() and re.search(only, name) is not None
            if not is_vector or name not in average or average[name].shape != t.shape or not is_plain(average[name]):
                continue
            if name.endswith("bias") or (name.endswith("weight") and "norm" in name):
                start = 0.0 if name.endswith("bias") else 1.0
                for i, vector in enumerate((average[name], t)):
                    moved[i] += float((vector.double() - start).square().sum())
        lags.append((moved[0] / moved[1]) ** 0.5 if moved[1] else 1.0)
    return min(lags)
