"""Write the model card of an artifact: how to load it, its license, source, data and report."""

from __future__ import annotations

import re
from collections.abc import Mapping

import timm
from jinja2 import Environment, PackageLoader, StrictUndefined
from timm.models import split_model_name_tag

from vitcompress.bundled import FASHION_VIT
from vitcompress.data.preprocessing import describe_preprocessing
from vitcompress.export.loaded import LoadedArtifact
from vitcompress.families.outputs import outputs_of
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import Report, from_json
from vitcompress.report.render import cell

_TEMPLATES = Environment(
    loader=PackageLoader("vitcompress.export"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    autoescape=False, keep_trailing_newline=True,  # Markdown, not HTML
)  # fmt: skip
_TEMPLATES.filters["cell"] = cell
_NAME = re.compile(r"[A-Za-z0-9_./-]{1,200}")  # a license or model name that means nothing in YAML or Markdown
_TASKS = {  # the Hub's words; it has none for numbers
    "classes": "image-classification", "multi_label": "image-classification", "features": "image-feature-extraction",
}  # fmt: skip
UNKNOWN = "other"  # the Hub's word for a license that is not in its list


def model_card(artifact: LoadedArtifact, *, picture: str | None) -> str:
    """Return the README.md for the Hugging Face Hub.

    Args:
        artifact: the artifact.
        picture: name of the picture beside it that shows the report; None if there is none.
    """
    manifest = artifact.manifest
    report = from_json(manifest.report)
    licence = licence_of(artifact)
    return _TEMPLATES.get_template("README.md.j2").render(
        title=f"{report.model}, {report.size.params_ratio:.1f}× fewer parameters",
        license=licence or UNKNOWN,
        licence_text=_licence_text(licence),
        base_model=_base_model(artifact),
        task=_TASKS.get(outputs_of(artifact.student).name),
        outputs=_describe_outputs(artifact),
        source=manifest.source,
        source_sha256=manifest.source_sha256,
        plan=manifest.plan,
        preprocessing=describe_preprocessing(manifest.data_config),
        store="as in the source" if manifest.store == "source" else manifest.store,
        data=_data(report),
        report=to_markdown(report, picture=picture),
    )


def _describe_outputs(artifact: LoadedArtifact) -> str:
    """Return a row of the table: what the outputs are, and how many."""
    kind, count = outputs_of(artifact.student), artifact.student.num_classes
    rows = {
        "classes": f"| classes | {count} |",
        "multi_label": f"| labels | {count}, each with a sigmoid of its own |",
        "regression": f"| numbers | {count}; outputs are a regression |",
    }
    return rows.get(kind.name, "| classes | none; outputs are features |")


def licence_of(artifact: LoadedArtifact) -> str | None:
    """Return the license of the weights, in the Hub's words; None if it is not known.

    Only the user knows the license of weights that came from a file.
    """
    source = artifact.manifest.source
    if source["name"] == FASHION_VIT.name:
        return "apache-2.0"  # the built-in weights are part of this package
    if _from_checkpoint(artifact):
        return None
    licence = source["pretrained_cfg"].get("license")
    if not source["pretrained_cfg"]:
        licence = getattr(timm.get_pretrained_cfg(source["architecture"]), "license", None)
    return licence if isinstance(licence, str) and _NAME.fullmatch(licence) else None


def _from_checkpoint(artifact: LoadedArtifact) -> bool:
    """Return whether the weights came from a file, as far as the manifest tells."""
    model = artifact.manifest.recipe.get("model")  # not validated when the manifest is read: it can be anything
    checkpoint = model.get("checkpoint") if isinstance(model, Mapping) else model
    return bool(artifact.manifest.lineage) or checkpoint is not None


def _licence_text(licence: str | None) -> str:
    if licence is None:
        return "that of the weights it was made from, which the file does not name: **fill it in, here and above**."
    return f"{licence}, that of the weights it was made from."


def _base_model(artifact: LoadedArtifact) -> str | None:
    """Return the Hub's name of the source; None if it is not certain."""
    name, architecture = str(artifact.manifest.source["name"]), str(artifact.manifest.source["architecture"])
    if name.startswith("hf-hub:"):
        repo = name.removeprefix("hf-hub:").partition("@")[0]
        return repo if _NAME.fullmatch(repo) else None
    tagged = bool(split_model_name_tag(architecture)[1]) and not _from_checkpoint(artifact)
    return f"timm/{architecture}" if tagged else None


def _data(report: Report) -> str:
    trained = f"trained on {report.data}" if report.train.steps else "not trained"
    return f"{trained}; {f'measured on {report.accuracy.data}' if report.accuracy else 'not measured'}."
