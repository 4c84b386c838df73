"""What does a model card say of an artifact?  Its report, its licence, its source, its data, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import timm
from jinja2 import Environment, PackageLoader, StrictUndefined
from timm.models import split_model_name_tag

from vitcompress.bundled import FASHION_VIT
from vitcompress.export.subject import Subject
from vitcompress.families.outputs import has_classes
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import Report
from vitcompress.report.reading import from_json
from vitcompress.report.render import cell

_TEMPLATES = Environment(
    loader=PackageLoader("vitcompress.export"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    autoescape=False, keep_trailing_newline=True,  # Markdown, not HTML
)  # fmt: skip
_TEMPLATES.filters["cell"] = cell
_NAME = re.compile(r"[A-Za-z0-9_./-]{1,200}")  # of a licence or a model, so that it is nothing else in YAML or Markdown
UNKNOWN = "other"  # what the Hub calls a licence that is none of its list


def model_card(subject: Subject, *, picture: str | None) -> str:
    """A README.md for the Hugging Face Hub.

    Args:
        subject: the artifact.
        picture: name of the file beside it that shows the report; None where there is none.
    """
    manifest = subject.manifest
    report = from_json(manifest.report)
    licence = licence_of(subject)
    return _TEMPLATES.get_template("README.md.j2").render(
        title=f"{report.model}, {report.size.params_ratio:.1f}× fewer parameters",
        license=licence or UNKNOWN,
        licence_text=_licence_text(licence),
        base_model=_base_model(subject),
        task="image-classification" if has_classes(subject.student) else "image-feature-extraction",
        source=manifest.source,
        source_sha256=manifest.source_sha256,
        plan=manifest.plan,
        config=manifest.data_config,
        num_classes=subject.student.num_classes,
        store="the source has it" if manifest.store == "source" else manifest.store,
        data=_data(report),
        report=to_markdown(report, picture=picture),
    )


def licence_of(subject: Subject) -> str | None:
    """The licence of the weights, in the Hub's words; None where it is not known.

    Weights from a file of the user's are under a licence that only the user knows.
    """
    source = subject.manifest.source
    if source["name"] == FASHION_VIT.name:
        return "apache-2.0"  # the built-in weights are part of this package
    if _from_checkpoint(subject):
        return None
    found = source["pretrained_cfg"].get("license")
    if not found and not source["pretrained_cfg"]:
        found = getattr(timm.get_pretrained_cfg(source["architecture"]), "license", None)
    return found if isinstance(found, str) and _NAME.fullmatch(found) else None


def _from_checkpoint(subject: Subject) -> bool:
    model = subject.manifest.recipe.get("model")  # text to be shown, so perhaps anything
    given = model.get("checkpoint") is not None if isinstance(model, Mapping) else model is not None
    return bool(subject.manifest.lineage) or given


def _licence_text(licence: str | None) -> str:
    if licence is None:
        return "that of the weights it was made from, which the file does not know: **fill it in, here and above**."
    return f"{licence}, that of the weights it was made from."


def _base_model(subject: Subject) -> str | None:
    """The Hub's name of the source, where there is no doubt about it."""
    name, architecture = str(subject.manifest.source["name"]), str(subject.manifest.source["architecture"])
    if name.startswith("hf-hub:"):
        found = name.removeprefix("hf-hub:").partition("@")[0]
        return found if _NAME.fullmatch(found) else None
    tagged = bool(split_model_name_tag(architecture)[1]) and not _from_checkpoint(subject)
    return f"timm/{architecture}" if tagged else None


def _data(report: Report) -> str:
    trained = f"trained on {report.data}" if report.train.steps else "not trained"
    return f"{trained}; {f'measured on {report.accuracy.data}' if report.accuracy else 'not measured'}."
