"""Collect what a page or a table shows of a file: its report, recipe, classes and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitcompress.artifact.atomic import write_text
from vitcompress.artifact.hub import locate
from vitcompress.artifact.paths import check_no_weights, check_not_an_input
from vitcompress.artifact.read import read_manifest
from vitcompress.data.preprocessing import describe_preprocessing
from vitcompress.errors import RecipeError
from vitcompress.recipe import DataRecipe, Recipe
from vitcompress.report.model import Result, from_json
from vitcompress.report.remarks import chance_warning
from vitcompress.runtime.console import Reporter

if TYPE_CHECKING:
    from vitcompress.artifact.manifest import Manifest
    from vitcompress.measure.examples import Examples


def result_of(file: Path, *, named_classes: bool = False) -> Result:
    """Read the report and the recipe of a file; imports torch only for names of classes.

    Args:
        file: an artifact, as `locate` takes it.
        named_classes: look up the names of the classes too, for a page.

    Raises:
        ArtifactError: the file is not an artifact, or of another schema.
    """
    path = locate(file)
    manifest = read_manifest(path)
    report = from_json(manifest.report)
    if not report.preprocessing:  # written by an older version
        report = replace(report, preprocessing=describe_preprocessing(manifest.data_config))
    classes = class_names(manifest) if named_classes else ()
    return Result(file.name, path.stat().st_size, report, manifest.recipe, classes)


def examples_of(
    file: Path, recipe: DataRecipe, *, checkpoint: Path | None, checkpoint_key: str | None, reporter: Reporter
) -> Examples:
    """Evaluate a file, and collect the images on which it differs most from its teacher.

    Args:
        file: an artifact.
        recipe: the images.
        checkpoint: weights of the source; None to look for them.
        checkpoint_key: key of the weights in that file; None to find them.
        reporter: says why there is no teacher.
    """
    from vitcompress.artifact.load import empty_student
    from vitcompress.families.outputs import outputs_of
    from vitcompress.measure.examples import Examples
    from vitcompress.pipeline.evaluate import Checkpoint, evaluate

    path = locate(file)
    manifest = read_manifest(path)
    config, kind = manifest.data_config, outputs_of(empty_student(path, manifest))
    examples = Examples(config["mean"], config["std"], kind)
    weights = Checkpoint(checkpoint, checkpoint_key)
    examples.accuracy = evaluate(file, recipe, checkpoint=weights, reporter=reporter, watch=examples.watch)
    for line in chance_warning(examples.accuracy):
        reporter.say(line)
    return examples


def check_page(out: Path, files: Sequence[Path], checkpoint: Path | None = None) -> None:
    """Make sure that a page replaces neither a file that is read nor any weights.

    Args:
        out: path of the page.
        files: the artifacts that it shows, as `locate` takes them.
        checkpoint: weights that are read.

    Raises:
        RecipeError: it would replace one.
    """
    check_not_an_input("--html", out, {**{str(file): locate(file) for file in files}, "--checkpoint": checkpoint})
    check_no_weights("--html", out)


def check_picture(recipe: Recipe, out: Path) -> None:
    """Make sure, before anything is measured, that a frontier can be drawn into a file.

    Args:
        recipe: what to do; the file is none that it reads.
        out: path of the drawing or page.

    Raises:
        RecipeError: it cannot.
    """
    from vitcompress.pipeline.checks import check_writable, files_read

    if out.suffix not in (".svg", ".html"):
        raise RecipeError(f"--plot {out}: drawings are .svg or .html.", hint=f"Give --plot {out.with_suffix('.svg')}.")
    check_writable("--plot", out, example="frontier.svg")
    check_not_an_input("--plot", out, files_read(recipe))


def write_page(out: Path, html: str, reporter: Reporter) -> None:
    """Write a page, whole or not at all.

    Raises:
        ArtifactError: the folder cannot be written to.
    """
    write_text(out, html)
    reporter.say(f"wrote {out}")


def class_names(manifest: Manifest) -> tuple[str, ...]:
    """Return readable class names: for ImageNet, descriptions instead of WordNet numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    from vitcompress.data.classes import known_classes

    cfg = manifest.source["pretrained_cfg"]
    count = manifest.source["model_args"].get("num_classes", cfg.get("num_classes", len(manifest.classes)))
    if not isinstance(count, int):
        return ()
    names = known_classes(manifest.classes, cfg, count)
    subset = infer_imagenet_subset({"num_classes": count})
    if subset and names:
        imagenet = ImageNetInfo(subset)
        if names == tuple(imagenet.label_names()):
            return tuple(imagenet.index_to_description(index).partition(",")[0] for index in range(count))
    return names
