"""Train on smaller views first (progressive resizing): more images in the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.families.view_size import half_size, taking_views
from vitcompress.recipe import DistillRecipe

Resize = Callable[[Tensor, float], Tensor]


def small_views_fault(reason: str, recipe: DistillRecipe, *, name: str) -> list[tuple[str, str]]:
    """Return the fault of small views that a model does not take, as `(message, hint)` pairs.

    Args:
        reason: why it does not; empty where it does.
        recipe: asks for small views.
        name: the user's name for the model.
    """
    if not reason:
        return []
    return [(f"--small-first {recipe.small_first:g}: {name} takes images of one size ({reason}).", "Leave it out.")]


@contextmanager
def small_views_first(student: nn.Module, teacher: nn.Module | None, share: float) -> Iterator[Resize]:
    """Let student and teacher take views of half the size at the start of a training, in place.

    Args:
        student: takes views of that size, unless `share` is 0.
        teacher: likewise; None where no loss needs one.
        share: share of the training with small views, 0-1.

    Yields:
        A function `(views, share of the training that is over) -> views` of the size to train on.
        From the first call with a later share on, the models take full views.

    Source: progressive resizing, as in fast.ai's entry to DAWNBench, 2018; Touvron et al. 2022,
        arXiv:2204.07118, Sec. 3, for vision transformers.
    """
    with ExitStack() as small:
        if share:
            size = half_size(student)
            for model in filter(None, (student, teacher)):
                small.enter_context(taking_views(model, size))

        def resize(views: Tensor, done: float) -> Tensor:
            if done < share:
                return F.interpolate(views, size, mode="bicubic", antialias=True)
            small.close()
            return views

        yield resize
