"""Compare the outputs of an export with the artifact's, on batches of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vitcompress.bundled import FASHION_VIT
from vitcompress.data.classes import ModelClasses
from vitcompress.data.loaders import count_unreadable, evaluation_loader
from vitcompress.data.open import open_to_evaluate
from vitcompress.errors import ExportError
from vitcompress.export.loaded import LoadedArtifact
from vitcompress.families.outputs import has_classes
from vitcompress.recipe import BUILT_IN, DataRecipe

Run = Callable[[Tensor], Tensor]

BATCH_SIZE = 8
NOISE_IMAGES = 4


@dataclass(frozen=True)
class Tolerance:
    """How far outputs may differ, as fractions of the artifact's largest output.

    Attributes:
        outputs: maximum difference of any output; runtimes add up numbers in different orders.
        tie: if two classes differ by less than this, either may be the most likely.
    """

    outputs: float = 1e-3
    tie: float = 1e-4


EXACT = Tolerance()


@dataclass(frozen=True)
class Probe:
    """Images to compare outputs on.

    Attributes:
        name: description for messages and reports.
        batches: images `[B, C, H, W]`, with different B.
    """

    name: str
    batches: tuple[Tensor, ...]


@dataclass(frozen=True)
class OutputMatch:
    """How well outputs match; fields as in `Exported`."""

    num_images: int
    max_difference: float
    largest_output: float
    same_top1: int | None


def read_probe(artifact: LoadedArtifact, data: Path | None, num_images: int) -> Probe:
    """Read images to compare on: the user's, or the built-in ones and noise.

    Args:
        artifact: the artifact; images are prepared as its model takes them.
        data: folder of images; None for the built-in ones and noise.
        num_images: maximum number of images, spread evenly over the folder.

    Raises:
        DataError: the folder has no readable images.
    """
    if data is None and artifact.input_size[0] not in (1, 3):
        return Probe(f"{num_images} images of noise", _split(_noise(artifact, num_images)))
    spec = BUILT_IN if data is None else str(data)
    images = open_to_evaluate(spec, "--data", DataRecipe(), FASHION_VIT, ModelClasses(0))
    count = min(num_images, len(images))
    chosen = images.subset([position * len(images) // count for position in range(count)], images.name)
    recipe = DataRecipe(batch_size=BATCH_SIZE, num_workers=0)
    batches = []
    for batch in evaluation_loader(chosen, artifact.manifest.data_config, recipe):
        count_unreadable(batch, skip=False)
        batches.append(batch.images)
    if data is not None:
        return Probe(f"{count} images of {data}", _split(torch.cat(batches)))
    name = f"{count} built-in images and {NOISE_IMAGES} of noise"
    return Probe(name, _split(torch.cat([*batches, _noise(artifact, NOISE_IMAGES)])))


def _noise(artifact: LoadedArtifact, count: int) -> Tensor:
    return torch.randn(count, *artifact.input_size, generator=torch.Generator().manual_seed(0))


def _split(images: Tensor) -> tuple[Tensor, ...]:
    """Split images into batches of one, eight and the rest, to detect a fixed batch size."""
    return (images[:1], *(images[1:].split(BATCH_SIZE) if len(images) > 1 else ()))


def compare_outputs(
    student: nn.Module, run: Run, batches: Sequence[Tensor], tolerance: Tolerance = EXACT
) -> OutputMatch:
    """Compare the outputs of an export with those of the artifact's model.

    Args:
        student: the artifact's model, in eval mode on CPU.
        run: computes the export's outputs from images `[B, C, H, W]`.
        batches: batches of images `[B, C, H, W]`.
        tolerance: how far outputs may differ.

    Returns:
        How far they do.

    Raises:
        ExportError: outputs have another shape, are not finite or differ too much, or the most
            likely class of an image differs and is not a tie.
    """
    with torch.inference_mode():
        expected = torch.cat([student(images) for images in batches])
        outputs = torch.cat([run(images) for images in batches]).to(expected.dtype)
    if outputs.shape != expected.shape:
        raise ExportError(f"outputs have shape {tuple(outputs.shape)}, the artifact's {tuple(expected.shape)}")
    largest, difference = float(expected.abs().max()), float((outputs - expected).abs().max())
    if not difference <= tolerance.outputs * largest:
        raise ExportError(f"outputs differ by {difference:g} from the artifact's, the largest of which is {largest:g}")
    if not has_classes(student):
        return OutputMatch(len(expected), difference, largest, None)
    expected_top1, top1 = expected.argmax(1, keepdim=True), outputs.argmax(1, keepdim=True)
    margin = (expected.gather(1, expected_top1) - expected.gather(1, top1)).squeeze(1)
    wrong = int((margin > tolerance.tie * largest).sum())
    if wrong:
        raise ExportError(f"the most likely class of {wrong} of {len(expected)} images differs")
    return OutputMatch(len(expected), difference, largest, int((expected_top1 == top1).sum()))
