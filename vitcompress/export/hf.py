"""Export to a folder for the Hugging Face Hub: the file itself, a config and a model card.

folder/model.safetensors   the artifact, byte for byte
folder/config.json         description for tools; loading reads only the artifact
folder/README.md           the model card, with the report
folder/report.svg          picture of the report, if it has one
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vitcompress
from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.hub import WEIGHTS
from vitcompress.artifact.load import load
from vitcompress.errors import VitcompressError, first_line, shorten
from vitcompress.export.format import Format, Written
from vitcompress.export.hf_card import licence_of, model_card
from vitcompress.export.loaded import LoadedArtifact
from vitcompress.families.outputs import outputs_of
from vitcompress.pretrained.transformers_config import PROBLEM_TYPES
from vitcompress.report.model import from_json
from vitcompress.report.picture import to_svg

_PROBLEMS = {kind: problem for problem, kind in PROBLEM_TYPES.items()}
CONFIG, CARD, PICTURE = "config.json", "README.md", "report.svg"
FILES = frozenset({WEIGHTS, CONFIG, CARD, PICTURE})
TEXT_BYTES = 500_000  # maximum size of card, config and picture


def write(artifact: LoadedArtifact, path: Path) -> Written:
    """Write the files of the folder, and load the model from it.

    Args:
        artifact: the artifact.
        path: path of an empty folder.
    """
    shutil.copyfile(artifact.path, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(config_of(artifact), indent=2) + "\n", encoding="utf-8")
    picture = picture_of(artifact)
    if picture is not None:
        (path / PICTURE).write_text(picture, encoding="utf-8")
    card = model_card(artifact, picture=PICTURE if picture else None)
    (path / CARD).write_text(card, encoding="utf-8")
    limit = artifact.path.stat().st_size + TEXT_BYTES
    note = f"The license of its weights is not known: fill it in in {CARD} before you publish the folder."
    return Written(load(path), artifact.tensor_bytes, limit, () if licence_of(artifact) else (note,))


def picture_of(artifact: LoadedArtifact) -> str | None:
    """Return a plot of size against accuracy as SVG; None if the report has too little to draw."""
    return to_svg(from_json(artifact.manifest.report))


def config_of(artifact: LoadedArtifact) -> dict[str, Any]:
    """Return the content of config.json.

    `architecture` is below `vitcompress`, so that timm does not take the file for its own.
    `problem_type` is transformers' word for the kind of outputs of a model with a head.
    """
    manifest, kind = artifact.manifest, outputs_of(artifact.student)
    problem = {"problem_type": _PROBLEMS[kind.name]} if kind.name in _PROBLEMS else {}
    return {
        "library_name": "vitcompress",
        **problem,
        "vitcompress": {
            "version": vitcompress.__version__,
            "source": manifest.source["name"],
            "architecture": manifest.source["architecture"],
            "family": manifest.plan.family,
            "store": manifest.store,
            "num_params": manifest.plan.size.student_params,
            "num_classes": artifact.student.num_classes,
            "outputs": kind.name,
            "tensors_sha256": sha256_of(artifact.tensors),
            "data_config": dict(manifest.data_config),
        },
    }


@contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `out`, then move it over `out`.

    Yields:
        Path of an empty folder; it is removed if the block fails.

    Raises:
        VitcompressError: `out` cannot be written, is a file, or is a folder that an earlier export
            did not write.
    """
    check_folder(out)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise VitcompressError(f"--out {out}: cannot write there: {error.strerror}.") from error
    old = temporary / ".old"
    try:
        new = temporary / "new"
        new.mkdir()
        yield new
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    except OSError as error:
        raise VitcompressError(f"--out {out}: cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(out: Path) -> None:
    """Check that replacing `out` loses nothing but an earlier export.

    Raises:
        VitcompressError: `out` is a file, or a folder with other files in it.
    """
    if out.exists() and not out.is_dir():
        raise VitcompressError(f"--out {out} is a file; --to hf writes a folder.")
    if not out.exists() or not any(out.iterdir()):
        return
    foreign = sorted({file.name for file in out.iterdir()} - FILES)
    try:
        tree = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        exported = isinstance(tree, dict) and tree.get("library_name") == "vitcompress"
    except (OSError, ValueError):
        exported = False
    if foreign or not exported:
        reason = f"holds {shorten(foreign)}" if foreign else "was not written by vitcompress"
        raise VitcompressError(f"--out {out} {reason}; it would be replaced.", hint="Choose a new folder.")


def push_folder(folder: Path, repo: str) -> None:
    """Upload a folder to the Hugging Face Hub; create the repository if it does not exist.

    Args:
        folder: folder that `write` filled.
        repo: name of the repository, USER/REPO.

    Raises:
        VitcompressError: the upload failed.
    """
    import huggingface_hub  # seldom needed, and slow to import

    try:
        client = huggingface_hub.HfApi()
        client.create_repo(repo, exist_ok=True)
        client.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"Upload a model of vitcompress {vitcompress.__version__}"
        )
    except Exception as error:  # the Hub client raises dozens of types, from three libraries
        raise VitcompressError(
            f"--push {repo}: {first_line(error)} The folder {folder} was written.",
            hint="Log in with hf auth login, or upload it later: hf upload REPO FOLDER.",
        ) from error


HF = Format(write=write, suffix="", placing=replacing_folder)
