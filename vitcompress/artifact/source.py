"""Find a model to compress: one that timm knows, or a file whose blocks are still the source's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from vitcompress.artifact.load import empty_student, load, student_config
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.paths import SUFFIX
from vitcompress.artifact.read import read_manifest
from vitcompress.errors import ArtifactError, ModelError, RecipeError
from vitcompress.families.widths import Widths
from vitcompress.pretrained.load import load_pretrained
from vitcompress.pretrained.resolve import Source, resolve
from vitcompress.quantize.codecs import STORES
from vitcompress.recipe import ModelRecipe

FILE = "file:"  # before the name of a file, in the name of a source


def find_source(recipe: ModelRecipe) -> Source:
    """Return the model that a recipe names; reads no weights.

    Args:
        recipe: a file that `finetune` or `compress` wrote, or any name that `resolve` takes.

    Raises:
        VitcompressError: there is no such model, or the file's blocks are compressed already.
    """
    path = model_file(recipe)
    return resolve(recipe) if path is None else _from_artifact(path, recipe)


def model_file(recipe: ModelRecipe) -> Path | None:
    """Return the file that a recipe names as its model; None where it names no file."""
    return Path(recipe.model) if recipe.model.endswith(SUFFIX) else None


def load_weights(source: Source, tell: Callable[[str], object] = lambda text: None) -> nn.Module:
    """Return a source with its weights, in float32, on CPU, in eval mode.

    Args:
        source: from `find_source`.
        tell: receives sentences on what was done with the weights.

    Raises:
        VitcompressError: the weights cannot be loaded.
    """
    return load(source.artifact) if source.artifact is not None else load_pretrained(source, tell)


def _from_artifact(path: Path, recipe: ModelRecipe) -> Source:
    if recipe.checkpoint is not None or recipe.model_arg:
        raise RecipeError(
            f"MODEL {path} is a file with its own weights and sizes.", hint="Leave out --checkpoint and --model-arg."
        )
    try:
        manifest = read_manifest(path)
    except ArtifactError as error:
        hint = "If it holds weights alone, name their architecture: MODEL --checkpoint FILE." if path.exists() else ""
        raise ArtifactError(str(error), hint=error.hint or hint) from error
    model = empty_student(path, manifest)
    made = _compressions(manifest)
    if made:
        raise ModelError(
            f"MODEL {path} is compressed already: {', '.join(made)}.",
            hint="Name the model that it was made from. To train the file further: vitcompress finetune.",
        )
    source = Source(**manifest.source)
    return replace(
        source, name=f"{FILE}{path.name}", pretrained_cfg=student_config(model, manifest), artifact=path,
        outputs=recipe.outputs or source.outputs,
    )  # fmt: skip


def _compressions(manifest: Manifest) -> list[str]:
    """Return what makes a file's model differ from timm's; empty where nothing does."""
    plan = manifest.plan
    found = {
        "blocks share weights": any(len(group.blocks) > 1 for group in plan.groups),
        "blocks are narrow": any(group.widths != Widths() for group in plan.groups),
        "layers have low rank": any(group.ranks for group in plan.groups),
        "parts of blocks are left out": any(group.skipped for group in plan.groups),
        f"blocks have transformations ({', '.join(plan.transforms)})": bool(plan.transforms),
        f"weights are rounded to {manifest.store}": STORES[manifest.store].codec is not None,
    }
    return [text for text, is_so in found.items() if is_so]
