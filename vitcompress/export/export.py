"""Export an artifact to another format, and verify the result before it takes its place.

artifact ── write a temporary file ── read it back ── compare sizes and outputs ── move it to --out
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vitcompress.artifact.paths import check_not_an_input
from vitcompress.data.preprocessing import describe_preprocessing
from vitcompress.errors import ExportError, VitcompressError, first_line, nearest
from vitcompress.export.format import Format, Written
from vitcompress.export.hf import push_folder
from vitcompress.export.loaded import LoadedArtifact
from vitcompress.export.parity import compare_outputs, read_probe
from vitcompress.export.registry import FORMATS
from vitcompress.recipe import DataRecipe
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.extras import require_extra

NUM_IMAGES = 64


@dataclass(frozen=True)
class Exported:
    """Result of an export, and how it was verified.

    Attributes:
        format: a key of `FORMATS`.
        out: path of the file or folder.
        out_bytes: size of the file, or of all files in the folder.
        artifact_bytes: size of the artifact's file.
        tensor_bytes: size of the numbers in the result, without the structure that a file adds.
        images: images that outputs were compared on.
        num_images: number of those images.
        max_difference: largest difference of any output from the artifact's.
        largest_output: largest absolute output of the artifact, as the scale for `max_difference`.
        same_top1: number of images with the same most likely class; None if the model has no
            classes.
        notes: what a user of the result should know.
        top1: of the result, in percent; None without labeled images.
        artifact_top1: of the artifact, in percent, on the same images.
    """

    format: str
    out: str
    out_bytes: int
    artifact_bytes: int
    tensor_bytes: int
    images: str
    num_images: int
    max_difference: float
    largest_output: float
    same_top1: int | None
    notes: tuple[str, ...] = ()
    top1: float | None = None
    artifact_top1: float | None = None

    def lines(self) -> list[str]:
        """Return a summary for people, as lines of text."""
        size = f"{self.out}: {self.out_bytes:,} bytes (the artifact has {self.artifact_bytes:,}), verified"
        top1 = (
            "" if self.same_top1 is None else f"; the same most likely class on {self.same_top1} of {self.num_images}"
        )
        scale = f"the largest output is {self.largest_output:.3g}"
        difference = f"outputs differ by at most {self.max_difference:.2g} ({scale}) on {self.images}{top1}"
        labeled = [] if self.top1 is None else [f"top-1: {self.top1:.2f} % (the artifact: {self.artifact_top1:.2f} %)"]
        return [f"wrote {size}", difference, *labeled, *self.notes]


def export(
    path: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    data: Path | DataRecipe | None = None,
    num_images: int = NUM_IMAGES,
    push: str | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Export an artifact to another format, and check that the result computes the same.

    Args:
        path: a file that `vitcompress compress` or `finetune` wrote.
        to: the format, a key of `FORMATS`.
        out: path of the file to write, or of the folder for `hf`; its parent folder exists.
        data: images to compare outputs on, or a recipe that names them and says how their classes
            are numbered; None for the built-in ones and noise.
        num_images: maximum number of those images.
        push: repository of the Hugging Face Hub to upload the folder to; only for `hf`.
        reporter: receives progress; silent by default.

    Returns:
        What was written, and how it was verified.

    Raises:
        VitcompressError: the artifact cannot be written there, or not in this format.
        ExportError: the result has another size or other outputs; nothing of it is left.
    """
    reporter, out = reporter or Reporter(quiet=True), Path(out)
    target = _check(to, out, push)
    if to != "hf":  # hf writes a folder, which cannot replace a file
        check_not_an_input("--out", out, {str(path): Path(path)})
    artifact = LoadedArtifact.read(Path(path))
    target.check(artifact)
    recipe = data if data is None or isinstance(data, DataRecipe) else DataRecipe(data=str(data))
    probe = read_probe(artifact, recipe, num_images, reporter)
    with target.placing(out) as temporary:
        reporter.say(f"writing {out}")
        try:
            written = target.write(artifact, temporary)
        except (RuntimeError, ValueError) as error:  # torch's exporters raise these for what they do not support
            raise ExportError(f"{out} was not written: {first_line(error)}.") from error
        reporter.say(f"comparing outputs on {probe.name}")
        try:
            match = compare_outputs(artifact.student, written.run, probe, written.tolerance)
        except ExportError as error:
            raise ExportError(f"{out} was not written: {error}.") from error
        out_bytes = _check_size(temporary, out, written)
    reporter.tell("wrote", file=str(out), bytes=out_bytes)
    if push is not None:
        push_folder(out, push)
        reporter.say(f"pushed to {push}")
    preprocessing = f"preprocessing: {describe_preprocessing(artifact.manifest.data_config)}"
    return Exported(
        format=to, out=str(out), out_bytes=out_bytes, artifact_bytes=artifact.path.stat().st_size,
        tensor_bytes=written.tensor_bytes, images=probe.name, num_images=match.num_images,
        max_difference=match.max_difference, largest_output=match.largest_output, same_top1=match.same_top1,
        notes=(*match.warnings, *written.notes, *probe.notes, preprocessing),
        top1=match.top1, artifact_top1=match.artifact_top1,
    )  # fmt: skip


def _check(to: str, out: Path, push: str | None) -> Format:
    """Check the options, and return the format.

    Raises:
        VitcompressError: the format is unknown, --out or --push does not suit it, or a package is
            missing.
    """
    if to not in FORMATS:
        raise VitcompressError(
            f"--to {to} is not a format{nearest(to, FORMATS)}.", hint=f"Formats: {', '.join(FORMATS)}."
        )
    target = FORMATS[to]
    if push is not None and to != "hf":
        raise VitcompressError(f"--push uploads the folder that --to hf writes; --to {to} writes none.")
    if target.suffix and out.suffix != target.suffix:
        raise VitcompressError(f"--out {out}: the file name of --to {to} must end in {target.suffix}.")
    if target.suffix and out.is_dir():
        raise VitcompressError(f"--out {out} is a folder.")
    if target.extra:
        require_extra(target.extra, f"--to {to}")
    return target


def _check_size(temporary: Path, out: Path, written: Written) -> int:
    """Check that the result holds nothing twice, by its size.

    Args:
        temporary: the file or folder that was written.
        out: path that it will have.
        written: its limit.

    Returns:
        Its size in bytes.

    Raises:
        ExportError: it is too large.
    """
    files = [file for file in temporary.rglob("*") if file.is_file()] if temporary.is_dir() else [temporary]
    num_bytes = sum(file.stat().st_size for file in files)
    if num_bytes > written.limit_bytes:
        raise ExportError(
            f"{out} was not written: it has {num_bytes:,} bytes and should have at most {written.limit_bytes:,}, so it "
            "holds what blocks share more than once."
        )
    return num_bytes
