"""What is fine-tuned: an artifact, or a model of timm as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.load import check_known, load
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.read import read_manifest
from vitcompress.artifact.source import model_file
from vitcompress.distill.teacher import Teacher, find_teacher
from vitcompress.errors import RecipeError, VitcompressError
from vitcompress.families.outputs import outputs_of
from vitcompress.pipeline.checks import check_checkpoint
from vitcompress.pipeline.write import described
from vitcompress.plans.make import make_plan
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import data_config
from vitcompress.pretrained.load import load_pretrained
from vitcompress.pretrained.resolve import resolve
from vitcompress.recipe import ModelRecipe, PlanRecipe, Recipe, TeacherRecipe, flag_of
from vitcompress.recipe.compose import to_dict
from vitcompress.report.model import Parent


@dataclass(frozen=True)
class Origin:
    """A model to fine-tune.

    Attributes:
        name: the user's name for it.
        manifest: of the artifact; for a model of timm, what an artifact of it would have.
        load: returns the model with its weights, on CPU, in eval mode; receives what takes
            sentences on what was done with them.
        path: the artifact; None for a model of timm.
    """

    name: str
    manifest: Manifest
    load: Callable[[Callable[[str], object]], nn.Module]
    path: Path | None = None

    def lineage(self, model: nn.Module) -> tuple[Parent, ...]:
        """Return the files and models that the result is made from, oldest first.

        Args:
            model: what `load` returned.
        """
        older = tuple(Parent(**dict(entry)) for entry in self.manifest.lineage)
        if self.path is None:
            return (*older, Parent(self.name, sha256_of(model.state_dict()), ""))
        with self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return (*older, Parent(self.path.name, sha256, str(self.manifest.report.get("command", ""))))

    def teacher(self) -> Teacher | None:
        """Return the model that the origin was made from, with the preprocessing that it records.

        None where that has another head than the origin, where its name is a place to fetch code or
        weights from, or where it cannot be built.
        """
        source = self.manifest.source
        name = str(source["name"])
        if not self.manifest.source_sha256 or ":" in name:
            return None
        try:
            recipe = TeacherRecipe(name, None, dict(source["model_args"]))
            teacher = find_teacher(recipe, outputs=source.get("outputs"))
        except VitcompressError:
            return None
        return replace(teacher, config=dict(self.manifest.data_config))


def find_origin(recipe: ModelRecipe) -> Origin:
    """Find what is to be fine-tuned; reads no weights.

    Args:
        recipe: a file of vitcompress, or a model of timm.

    Raises:
        VitcompressError: there is no such file or model, or it may not be built.
    """
    path = model_file(recipe)
    return _from_timm(recipe) if path is None else _from_artifact(path)


def _from_artifact(path: Path) -> Origin:
    manifest = read_manifest(path)
    check_known(path, manifest)
    return Origin(path.name, manifest, lambda tell: load(path), path)


def _from_timm(recipe: ModelRecipe) -> Origin:
    check_checkpoint(recipe)
    source = resolve(recipe)
    model = empty_model(source)
    manifest = Manifest(
        source=described(source, outputs_of(model)),
        source_sha256="",
        plan=make_plan(model, PlanRecipe(share=1, transforms=()), name=recipe.model),
        data_config=data_config(model, recipe),
        recipe={},
        report={},
        versions={},
    )
    return Origin(source.name, manifest, lambda tell: load_pretrained(source, tell))


def check_unsettled(recipe: Recipe) -> None:
    """Make sure that a recipe to fine-tune sets nothing that the model has decided.

    Raises:
        RecipeError: it does; names every such option.
    """
    given, default = to_dict(recipe), to_dict(Recipe(ModelRecipe(recipe.model.model)))
    fades = ["--fade"] if recipe.distill.fade else []  # there are no matrices left to fade
    changed = fades + [
        flag_of(name)
        for stage in (("model",) if model_file(recipe.model) else ()) + ("plan", "target", "start")
        for name, value in given[stage].items()
        if value != default[stage][name]
    ]
    if changed:
        flags = ", ".join(changed)
        raise RecipeError(
            f"{flags} cannot be used with finetune: {recipe.model.model} already decides this.",
            hint=f"Remove {flags}.",
        )
