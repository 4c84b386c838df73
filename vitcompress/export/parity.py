"""Does what was written compute what the artifact does?  Outputs compared on images, in batches of several sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vitcompress.bundled import FASHION_VIT
from vitcompress.data.loaders import check_readable, evaluation_loader
from vitcompress.data.open import open_to_evaluate
from vitcompress.errors import ExportError
from vitcompress.export.subject import Subject
from vitcompress.families.outputs import has_classes
from vitcompress.recipe import BUILT_IN, DataRecipe

Run = Callable[[Tensor], Tensor]

BATCH_SIZE = 8
NOISE_IMAGES = 4


@dataclass(frozen=True)
class Tolerance:
    """How far from the artifact's outputs others may be, of the largest one.

    Attributes:
        outputs: any of them; runtimes add up in other orders.
        tie: of two classes that are nearer than this, either may be the most likely.
    """

    outputs: float = 1e-3
    tie: float = 1e-4


EXACT = Tolerance()


@dataclass(frozen=True)
class Probe:
    """Images to compare outputs on.

    Attributes:
        name: what they are.
        batches: each `[B, C, H, W]`, of more than one B.
    """

    name: str
    batches: tuple[Tensor, ...]


@dataclass(frozen=True)
class Comparison:
    """How far outputs are apart; fields as in `Exported`."""

    num_images: int
    max_difference: float
    largest_output: float
    same_top1: int | None


def probe_of(subject: Subject, data: Path | None, num_images: int) -> Probe:
    """Read the images to compare on: the user's; else the built-in ones, which any model can look at, and noise.

    Args:
        subject: decides how images are prepared.
        data: a folder; None for the built-in images.
        num_images: how many at most, spread evenly over those there are.

    Raises:
        DataError: the folder has none that can be read.
    """
    if data is None and subject.input_size[0] not in (1, 3):
        return Probe(f"{num_images} images of noise", _split(_noise(subject, num_images)))
    spec = BUILT_IN if data is None else str(data)
    images = open_to_evaluate(spec, "--data", DataRecipe(), FASHION_VIT, 0)
    count = min(num_images, len(images))
    chosen = images.subset([position * len(images) // count for position in range(count)], images.name)
    recipe = DataRecipe(batch_size=BATCH_SIZE, num_workers=0)
    seen = []
    for batch in evaluation_loader(chosen, subject.manifest.data_config, recipe):
        check_readable(batch, skip=False)
        seen.append(batch.images)
    if data is not None:
        return Probe(f"{count} images of {data}", _split(torch.cat(seen)))
    name = f"{count} built-in images and {NOISE_IMAGES} of noise"
    return Probe(name, _split(torch.cat([*seen, _noise(subject, NOISE_IMAGES)])))


def _noise(subject: Subject, count: int) -> Tensor:
    return torch.randn(count, *subject.input_size, generator=torch.Generator().manual_seed(0))


def _split(images: Tensor) -> tuple[Tensor, ...]:
    """Batches of one, of eight, and of what is left: an export that fixed the size of a batch is found out."""
    return tuple(itertools.chain(images[:1].split(1), images[1:].split(BATCH_SIZE) if len(images) > 1 else ()))


def compare(student: nn.Module, run: Run, batches: Sequence[Tensor], tolerance: Tolerance = EXACT) -> Comparison:
    """Hold outputs against those of the artifact's model.

    Args:
        student: the artifact's model, in eval mode on CPU.
        run: images `[B, C, H, W]` to the outputs of what was written.
        batches: images.
        tolerance: how far they may be apart.

    Raises:
        ExportError: an output has another shape, is not finite, or differs by more than that; or an image's most
            likely class is another one, and not by a tie.
    """
    with torch.inference_mode():
        expected = torch.cat([student(images) for images in batches])
    found = torch.cat([run(images) for images in batches]).to(expected.dtype)
    if found.shape != expected.shape:
        raise ExportError(f"outputs are {tuple(found.shape)}, the artifact's {tuple(expected.shape)}")
    largest, worst = float(expected.abs().max()), float((found - expected).abs().max())
    if not worst <= tolerance.outputs * largest:
        raise ExportError(f"outputs differ by {worst:g} from the artifact's, of which the largest is {largest:g}")
    if not has_classes(student):
        return Comparison(len(expected), worst, largest, None)
    ours, theirs = expected.argmax(1, keepdim=True), found.argmax(1, keepdim=True)
    margin = (expected.gather(1, ours) - expected.gather(1, theirs)).squeeze(1)
    wrong = int((margin > tolerance.tie * largest).sum())
    if wrong:
        raise ExportError(f"the most likely class of {wrong} of {len(expected)} images is another one")
    return Comparison(len(expected), worst, largest, int((ours == theirs).sum()))
