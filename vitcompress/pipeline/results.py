"""What is there to show of a file?  Its report, its recipe and its classes, gathered for a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset

from vitcompress.artifact import file as artifact
from vitcompress.artifact.hub import locate
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.paths import check_apart, check_no_weights
from vitcompress.data.classes import known_classes
from vitcompress.measure.examples import Examples
from vitcompress.recipe import DataRecipe
from vitcompress.report.model import Result
from vitcompress.report.reading import from_json
from vitcompress.runtime.console import Reporter


def result_of(file: Path) -> Result:
    """What a file says of itself, for people.

    Args:
        file: an artifact, or what `locate` takes for one.

    Raises:
        ArtifactError: it is none, or of another schema.
    """
    found = locate(file)
    manifest = artifact.read_manifest(found)
    report = from_json(manifest.report)
    return Result(file.name, found.stat().st_size, report, manifest.recipe, class_names(manifest))


def examples_of(file: Path, recipe: DataRecipe, *, checkpoint: Path | None, reporter: Reporter) -> Examples:
    """Evaluate a file anew, and collect the images on which it and its teacher differ most.

    Args:
        file: an artifact.
        recipe: the images.
        checkpoint: weights of the source; None to look for them.
        reporter: told why there is no teacher.
    """
    from vitcompress.pipeline import (
        compress as pipeline,
    )  # compare and diff need nothing of it, and it is slow to import

    config = artifact.read_manifest(locate(file)).data_config
    found = Examples(config["mean"], config["std"])
    found.accuracy = pipeline.evaluate(file, recipe, checkpoint=checkpoint, reporter=reporter, watch=found.watch)
    return found


def check_page(out: Path, files: Sequence[Path], checkpoint: Path | None = None) -> None:
    """Make sure that a page would take the place of nothing that is read, and of no weights.

    Args:
        out: the page.
        files: the artifacts that it shows, or what `locate` takes for such.
        checkpoint: weights that are read, too.

    Raises:
        RecipeError: it would.
    """
    check_apart("--html", out, {**{str(file): locate(file) for file in files}, "--checkpoint": checkpoint})
    check_no_weights("--html", out)


def write_page(out: Path, html: str, reporter: Reporter) -> None:
    """Write a page, whole or not at all, and say so.

    Raises:
        ArtifactError: the folder cannot be written to.
    """
    with artifact.replacing(out) as beside:
        beside.write_text(html, encoding="utf-8")
    reporter.say(f"wrote {out}")


def class_names(manifest: Manifest) -> tuple[str, ...]:
    """Names of the classes as people say them: of ImageNet's, not the WordNet number."""
    cfg = manifest.source["pretrained_cfg"]
    count = manifest.source["model_args"].get("num_classes", cfg.get("num_classes", len(manifest.classes)))
    if not isinstance(count, int):
        return ()
    names = known_classes(manifest.classes, cfg, count)
    subset = infer_imagenet_subset({"num_classes": count})
    if subset and names:
        known = ImageNetInfo(subset)
        if names == tuple(known.label_names()):
            return tuple(known.index_to_description(index).partition(",")[0] for index in range(count))
    return names
