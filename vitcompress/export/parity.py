"""Compare the outputs of an export with the artifact's, on batches of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.bundled import FASHION_VIT
from vitcompress.data.classes import ModelClasses, known_classes
from vitcompress.data.loaders import count_unreadable, evaluation_loader
from vitcompress.data.open import open_to_evaluate
from vitcompress.data.sets import ImageSet, renumbered
from vitcompress.errors import DataError, ExportError
from vitcompress.export.loaded import LoadedArtifact
from vitcompress.families.outputs import has_classes
from vitcompress.measure.results import Accuracy
from vitcompress.measure.tally import LogitTally
from vitcompress.pipeline.checks import bundle_of
from vitcompress.pipeline.labels import judge, numbered_line
from vitcompress.recipe import BUILT_IN, DataRecipe
from vitcompress.report.remarks import chance_warning
from vitcompress.runtime.console import Reporter

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
        labels: class index of each image, `[N]`; None without labels.
        notes: remarks on the images and their labels.
    """

    name: str
    batches: tuple[Tensor, ...]
    labels: Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutputMatch:
    """How well outputs match; fields as in `Exported`."""

    num_images: int
    max_difference: float
    largest_output: float
    same_top1: int | None
    top1: float | None = None
    artifact_top1: float | None = None
    warnings: tuple[str, ...] = ()


def read_probe(artifact: LoadedArtifact, data: DataRecipe | None, num_images: int, reporter: Reporter) -> Probe:
    """Read images to compare on: the user's, or the built-in ones and noise.

    Args:
        artifact: the artifact; images are prepared as its model takes them.
        data: the images, and how their classes are numbered; None for built-in ones and noise.
        num_images: maximum number of images, spread evenly over the folder.
        reporter: says how classes are numbered.

    Raises:
        DataError: there are no images, or one is unreadable.
    """
    if data is None:
        return _built_in_probe(artifact, num_images)
    images, notes = _open(artifact, data)
    for note in notes:
        reporter.say(note)
    chosen = _spread(images, num_images)
    batches, labels = _read(artifact, chosen)
    return Probe(
        f"{len(labels)} images of {data.data}", _split(batches), labels if images.numbering is not None else None, notes
    )


def _built_in_probe(artifact: LoadedArtifact, num_images: int) -> Probe:
    if artifact.input_size[0] not in (1, 3):
        return Probe(f"{num_images} images of noise", _split(_noise(artifact, num_images)))
    images = open_to_evaluate(BUILT_IN, "--data", DataRecipe(), FASHION_VIT, ModelClasses(0))
    batches, _ = _read(artifact, _spread(images, num_images))
    name = f"{len(batches)} built-in images and {NOISE_IMAGES} of noise"
    return Probe(name, _split(torch.cat([batches, _noise(artifact, NOISE_IMAGES)])))


def _open(artifact: LoadedArtifact, data: DataRecipe) -> tuple[ImageSet, tuple[str, ...]]:
    """Open images, labeled where their classes are the model's; return them with remarks."""
    student: Any = artifact.student
    manifest, spec = artifact.manifest, data.data or BUILT_IN
    count = student.num_classes if has_classes(student) else 0
    known = known_classes(manifest.classes, manifest.source["pretrained_cfg"], count)
    bundle = bundle_of(str(manifest.source["name"]), manifest.classes)
    try:
        images = open_to_evaluate(spec, "--data", data, bundle, ModelClasses(count, known))
        if images.numbering is None or not images.numbering.others:
            return images, (*images.notes, *filter(None, [numbered_line(images)]))
        judged = judge(images, student, manifest.data_config, data, artifact.path.name)
        return renumbered(images, judged.numbering), (*images.notes, judged.line)
    except DataError as error:  # outputs can be compared without labels
        if data.class_map is not None or data.class_order is not None:
            raise
        images = open_to_evaluate(spec, "--data", data, bundle, ModelClasses(0))
        return images, (*images.notes, f"Labels are not used: {error}")


def _spread(images: ImageSet, count: int) -> ImageSet:
    """Return at most `count` images, spread evenly."""
    count = min(count, len(images))
    return images.subset([position * len(images) // count for position in range(count)], images.name)


def _read(artifact: LoadedArtifact, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Return images `[N, C, H, W]` and their labels `[N]`."""
    batches = list(
        evaluation_loader(images, artifact.manifest.data_config, DataRecipe(batch_size=BATCH_SIZE, num_workers=0))
    )
    for batch in batches:
        count_unreadable(batch, skip=False)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def _noise(artifact: LoadedArtifact, count: int) -> Tensor:
    return torch.randn(count, *artifact.input_size, generator=torch.Generator().manual_seed(0))


def _split(images: Tensor) -> tuple[Tensor, ...]:
    """Split images into batches of one, eight and the rest, to detect a fixed batch size."""
    return (images[:1], *(images[1:].split(BATCH_SIZE) if len(images) > 1 else ()))


def compare_outputs(student: nn.Module, run: Run, probe: Probe, tolerance: Tolerance = EXACT) -> OutputMatch:
    """Compare the outputs of an export with those of the artifact's model.

    Args:
        student: the artifact's model, in eval mode on CPU.
        run: computes the export's outputs from images `[B, C, H, W]`.
        probe: images, and their labels, if any.
        tolerance: how far outputs may differ.

    Returns:
        How far they do.

    Raises:
        ExportError: outputs have another shape, are not finite or differ too much, or the most
            likely class of an image differs and is not a tie.
    """
    with torch.inference_mode():
        expected = torch.cat([student(images) for images in probe.batches])
        outputs = torch.cat([run(images) for images in probe.batches]).to(expected.dtype)
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
    same = int((expected_top1 == top1).sum())
    if probe.labels is None:
        return OutputMatch(len(expected), difference, largest, same)
    measured = _measured(outputs, expected, probe)
    warnings = tuple(chance_warning(measured))
    return OutputMatch(len(expected), difference, largest, same, measured.student_top1, measured.teacher_top1, warnings)


def _measured(outputs: Tensor, expected: Tensor, probe: Probe) -> Accuracy:
    """Return the accuracy of an export's outputs `[N, K]`, with the artifact as the teacher."""
    assert probe.labels is not None
    tally = LogitTally()
    tally.add(outputs.float(), expected.float(), probe.labels)
    return tally.result(probe.name)
