"""Survey the models that can be compressed, and how small sharing makes them.

Models are built on meta tensors: no weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import timm
from timm.models import is_model_in_modules, split_model_name_tag

from vitcompress.artifact.load import TIMM_MODULES
from vitcompress.bundled import FASHION_VIT
from vitcompress.errors import ModelError, VitcompressError, nearest
from vitcompress.families.registry import family_of
from vitcompress.plans.make import make_plan
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.resolve import resolve
from vitcompress.pretrained.short_names import SHORT_NAMES
from vitcompress.recipe import DEFAULT_SHARE, ModelRecipe, PlanRecipe


@dataclass(frozen=True)
class Row:
    """A model that can be compressed.

    Attributes:
        name: short name, or timm's where there is none.
        timm_name: timm's name.
        family: name of the family.
        teacher_params: parameters of the model.
        student_params: parameters with the default `--share` and its transformations.
        params_ratio: teacher's parameters over the student's.
    """

    name: str
    timm_name: str
    family: str
    teacher_params: int
    student_params: int
    params_ratio: float


@dataclass(frozen=True)
class Survey:
    """Models that a pattern selects.

    Attributes:
        share: blocks per group of the students.
        rows: models that can be compressed, in order of family and name.
        unfit: names of selected models that cannot be compressed.
        num_more: number of other pretrained models in the same modules of timm.
    """

    share: int
    rows: tuple[Row, ...]
    unfit: tuple[str, ...]
    num_more: int


def survey(pattern: str | None = None, *, tell: Callable[[float], None] = lambda done: None) -> Survey:
    """Count the parameters of models before and after the default plan.

    Args:
        pattern: part of a name, or a shell pattern of the whole; with a dot, timm's tags are
            included. None selects the models that have a short name.
        tell: called with the finished share, 0–1.

    Raises:
        ModelError: no name matches.
    """
    pretrained = _pretrained()
    chosen = _named() if pattern is None else _matching(pattern, pretrained)
    rows, unfit = [], []
    for number, (name, timm_name) in enumerate(chosen.items(), start=1):
        try:
            rows.append(_row(name, timm_name))
        except VitcompressError:
            unfit.append(name)
        tell(number / len(chosen))
    seen = {split_model_name_tag(timm_name)[0] for timm_name in chosen.values()}
    return Survey(
        DEFAULT_SHARE, tuple(sorted(rows, key=lambda row: (row.family, row.name))), tuple(unfit), len(pretrained - seen)
    )


def _named() -> dict[str, str]:
    """Return the models that have a short name."""
    return {FASHION_VIT.name: FASHION_VIT.name, **SHORT_NAMES}


def _pretrained() -> set[str]:
    """Return the pretrained models, without tags, in timm's modules of our families."""
    names = {split_model_name_tag(name)[0] for name in timm.list_pretrained()}
    return {name for name in names if is_model_in_modules(name, TIMM_MODULES)}


def _matching(pattern: str, pretrained: set[str]) -> dict[str, str]:
    """Return timm's name of each model that `pattern` selects, by the name to type."""
    names = sorted(pretrained)
    if "." in pattern:
        names += sorted(name for name in timm.list_pretrained() if split_model_name_tag(name)[0] in pretrained)
    known: Mapping[str, str] = {**_named(), **{n: n for n in names if n not in SHORT_NAMES.values()}}
    whole = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    selected = {
        name: timm_name for name, timm_name in known.items() if fnmatch(name, whole) or fnmatch(timm_name, whole)
    }
    if not selected:
        raise ModelError(
            f"No model name matches {pattern!r}{nearest(pattern, known)}.",
            hint="Give a part of a name, like deit3, or a pattern, like 'swin_*_384'.",
        )
    return selected


def _row(name: str, timm_name: str) -> Row:
    model = empty_model(resolve(ModelRecipe(name)))
    size = make_plan(model, PlanRecipe(), name=name).size
    family = family_of(model, name).name
    return Row(name, timm_name, family, size.teacher_params, size.student_params, size.params_ratio)
