"""What else can an artifact become?  A file of another format, verified before it counts as written.

artifact ── write beside the target ── read back ── sizes, outputs on images ── move over the target
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vitcompress.artifact.paths import check_apart
from vitcompress.errors import ExportError, VitcompressError, first_line, nearest
from vitcompress.export.executorch import EXECUTORCH
from vitcompress.export.formats import Format, Written
from vitcompress.export.hf import HF, push_folder
from vitcompress.export.onnx import ONNX
from vitcompress.export.parity import compare, probe_of
from vitcompress.export.pt2 import PT2
from vitcompress.export.subject import Exported, Subject
from vitcompress.export.timm import TIMM
from vitcompress.runtime.console import Reporter
from vitcompress.runtime.extras import require_extra

FORMATS: Mapping[str, Format] = {"onnx": ONNX, "pt2": PT2, "executorch": EXECUTORCH, "timm": TIMM, "hf": HF}
NUM_IMAGES = 64


def export(
    path: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    data: Path | None = None,
    num_images: int = NUM_IMAGES,
    push: str | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Write an artifact in another format, and make sure that it computes the same.

    Args:
        path: a file that `vitcompress compress` or `finetune` wrote.
        to: a key of `FORMATS`.
        out: the file to write, or for `hf` the folder; its own folder exists.
        data: images to compare outputs on; None for the built-in ones and noise.
        num_images: how many at most.
        push: a repository of the Hugging Face Hub to upload the folder to; for `hf` alone.
        reporter: told what is going on; silent by default.

    Returns:
        What was written, and how it was verified.

    Raises:
        VitcompressError: it cannot be written there, or not in this format.
        ExportError: what was written has other sizes or other outputs; nothing is left of it.
    """
    reporter, out = reporter or Reporter(quiet=True), Path(out)
    how = _checked(to, out, push)
    if to != "hf":  # which writes a folder, over no file at all
        check_apart("--out", out, {str(path): Path(path)})
    subject = Subject.of(Path(path))
    how.check(subject)
    probe = probe_of(subject, data, num_images)
    with how.placing(out) as beside:
        reporter.say(f"writing {out}")
        try:
            written = how.write(subject, beside)
        except (RuntimeError, ValueError) as error:  # what torch's exporters raise where they meet something new
            raise ExportError(f"{out} was not written: {first_line(error)}.") from error
        reporter.say(f"comparing outputs on {probe.name}")
        try:
            found = compare(subject.student, written.run, probe.batches, written.tolerance)
        except ExportError as error:
            raise ExportError(f"{out} was not written: {error}.") from error
        out_bytes = _check_size(beside, out, written)
    reporter.tell("wrote", file=str(out), bytes=out_bytes)
    if push is not None:
        push_folder(out, push)
        reporter.say(f"pushed to {push}")
    return Exported(
        format=to, out=str(out), out_bytes=out_bytes, artifact_bytes=subject.path.stat().st_size,
        tensor_bytes=written.tensor_bytes, images=probe.name, num_images=found.num_images,
        max_difference=found.max_difference, largest_output=found.largest_output, same_top1=found.same_top1,
        notes=written.notes,
    )  # fmt: skip


def _checked(to: str, out: Path, push: str | None) -> Format:
    """The format, once it is known that what was asked for can be begun."""
    if to not in FORMATS:
        raise VitcompressError(
            f"--to {to} is no format{nearest(to, FORMATS)}.", hint=f"There are: {', '.join(FORMATS)}."
        )
    how = FORMATS[to]
    if push is not None and to != "hf":
        raise VitcompressError(f"--push uploads the folder of --to hf; --to {to} writes none.")
    if how.suffix and out.suffix != how.suffix:
        raise VitcompressError(f"--out {out}: a file of --to {to} ends in {how.suffix}.")
    if how.suffix and out.is_dir():
        raise VitcompressError(f"--out {out} is a folder.")
    if how.extra:
        require_extra(how.extra, f"--to {to}")
    return how


def _check_size(beside: Path, out: Path, written: Written) -> int:
    """Bytes of what was written, once it is known that nothing is in it twice."""
    files = [file for file in beside.rglob("*") if file.is_file()] if beside.is_dir() else [beside]
    found = sum(file.stat().st_size for file in files)
    if found > written.limit_bytes:
        raise ExportError(
            f"{out} was not written: it has {found:,} bytes, and may have {written.limit_bytes:,}: what blocks share "
            "would be in it more than once."
        )
    return found


__all__ = ["FORMATS", "NUM_IMAGES", "Exported", "export"]
