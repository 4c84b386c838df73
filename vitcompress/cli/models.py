"""Which models can be compressed, and how small does sharing make them?

Counted on meta tensors: no weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import timm
from rich.console import Console
from timm.models import is_model_in_modules, split_model_name_tag

from vitcompress.artifact.load import MODULES
from vitcompress.bundled import FASHION_VIT
from vitcompress.errors import ModelError, VitcompressError, nearest, shorten
from vitcompress.families.find import family_of
from vitcompress.plans.make import make_plan
from vitcompress.pretrained.short_names import SHORT_NAMES
from vitcompress.pretrained.source import empty_model, resolve
from vitcompress.recipe import DEFAULT_SHARE, ModelRecipe, PlanRecipe


@dataclass(frozen=True)
class Row:
    """A model that can be compressed.

    Attributes:
        name: what to type.
        timm_name: timm's name of it; the same where there is no short one.
        family: of the model.
        teacher_params: before.
        student_params: after, with the default `--share` and its transformations.
        params_ratio: of the two.
    """

    name: str
    timm_name: str
    family: str
    teacher_params: int
    student_params: int
    params_ratio: float


@dataclass(frozen=True)
class Survey:
    """What was asked for.

    Attributes:
        share: blocks per group that the rows are counted with.
        rows: in order of family and name.
        unfit: names that the pattern selects too, but that cannot be compressed.
        num_more: names with pretrained weights, of the same modules of timm, that were not looked at.
    """

    share: int
    rows: tuple[Row, ...]
    unfit: tuple[str, ...]
    num_more: int


def survey(pattern: str | None = None, *, tell: Callable[[float], None] = lambda done: None) -> Survey:
    """Count what the default plan makes of the models that `pattern` selects.

    Args:
        pattern: a part of a name, or a shell pattern of the whole; with a dot in it timm's tags count too. None: the
            models that have a short name.
        tell: told the share of the models that is done, 0–1.

    Raises:
        ModelError: no name is like it.
    """
    every = _pretrained()
    chosen = _named() if pattern is None else _matching(pattern, every)
    rows, unfit = [], []
    for number, (name, timm_name) in enumerate(chosen.items(), start=1):
        try:
            rows.append(_row(name, timm_name))
        except VitcompressError:
            unfit.append(name)
        tell(number / len(chosen))
    seen = {split_model_name_tag(timm_name)[0] for timm_name in chosen.values()}
    return Survey(
        DEFAULT_SHARE, tuple(sorted(rows, key=lambda row: (row.family, row.name))), tuple(unfit), len(every - seen)
    )


def print_survey(found: Survey, console: Console) -> None:
    """Print a line per model, which programs for text can take apart, and what was left out."""
    width = max((len(row.name) for row in found.rows), default=0)
    lines = [f"{'model':<{width}}  {'family':<8}{'parameters':>14}{f'--share {found.share}':>15}   fewer"]
    lines += [
        f"{row.name:<{width}}  {row.family:<8}{row.teacher_params:>14,}{row.student_params:>15,}"
        f"{row.params_ratio:>7.2f}×"
        for row in found.rows
    ]
    if found.unfit:
        lines.append(f"not to be compressed: {shorten(found.unfit)}")
    if found.num_more:
        lines.append(f"{found.num_more} more names of timm: vitcompress models PATTERN")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _named() -> dict[str, str]:
    """What has a short name."""
    return {FASHION_VIT.name: FASHION_VIT.name, **SHORT_NAMES}


def _pretrained() -> set[str]:
    """Models of timm with pretrained weights, of the modules that hold our families; without tags."""
    names = {split_model_name_tag(name)[0] for name in timm.list_pretrained()}
    return {name for name in names if is_model_in_modules(name, MODULES)}


def _matching(pattern: str, every: set[str]) -> dict[str, str]:
    """What to type and timm's name, of all that `pattern` selects; a model that has a short name by that."""
    names = sorted(every)
    if "." in pattern:
        names += sorted(name for name in timm.list_pretrained() if split_model_name_tag(name)[0] in every)
    known: Mapping[str, str] = {**_named(), **{n: n for n in names if n not in SHORT_NAMES.values()}}
    whole = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = {name: timm_name for name, timm_name in known.items() if fnmatch(name, whole) or fnmatch(timm_name, whole)}
    if not found:
        raise ModelError(
            f"No model is called like {pattern!r}{nearest(pattern, known)}.",
            hint="Give a part of a name, like deit3, or a pattern, like 'swin_*_384'.",
        )
    return found


def _row(name: str, timm_name: str) -> Row:
    model = empty_model(resolve(ModelRecipe(name)))
    size = make_plan(model, PlanRecipe(), name=name).size
    family = family_of(model, name).name
    return Row(name, timm_name, family, size.teacher_params, size.student_params, size.params_ratio)
