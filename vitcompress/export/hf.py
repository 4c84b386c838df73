"""How does an artifact become a folder for the Hugging Face Hub?  The file itself, a config, and a model card.

folder/model.safetensors   the artifact, byte for byte
folder/config.json         what it is, for tools; loading reads the artifact alone
folder/README.md           the model card, with the report
folder/report.svg          its picture, where there is one
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

import torch
from torch import Tensor

import vitcompress
from vitcompress.artifact import hub
from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.load import load
from vitcompress.errors import VitcompressError, first_line, shorten
from vitcompress.export.card import licence_of, model_card
from vitcompress.export.formats import Format, Written
from vitcompress.export.subject import Subject
from vitcompress.report.picture import to_svg
from vitcompress.report.reading import from_json

CONFIG, CARD, PICTURE = "config.json", "README.md", "report.svg"
FILES = frozenset({hub.WEIGHTS, CONFIG, CARD, PICTURE})
TEXT_BYTES = 500_000  # that card, config and picture may take


def write(subject: Subject, path: Path) -> Written:
    """Write the folder, and load the model from it.

    Args:
        subject: the artifact.
        path: an empty folder.
    """
    shutil.copyfile(subject.path, path / hub.WEIGHTS)
    (path / CONFIG).write_text(json.dumps(config_of(subject), indent=2) + "\n", encoding="utf-8")
    picture = picture_of(subject)
    if picture is not None:
        (path / PICTURE).write_text(picture, encoding="utf-8")
    card = model_card(subject, picture=PICTURE if picture else None)
    (path / CARD).write_text(card, encoding="utf-8")
    loaded = load(path)

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            outputs: Tensor = loaded(images)
        return outputs

    limit = subject.path.stat().st_size + TEXT_BYTES
    unknown = f"The licence of its weights is not known: fill it in in {CARD}, before anybody uses it."
    return Written(run, subject.tensor_bytes, limit, () if licence_of(subject) else (unknown,))


def picture_of(subject: Subject) -> str | None:
    """Size against accuracy, as SVG, where the report has enough to draw."""
    return to_svg(from_json(subject.manifest.report))


def config_of(subject: Subject) -> dict[str, Any]:
    """What config.json says. `architecture` stands below `vitcompress`, so that timm does not take it for its own."""
    manifest = subject.manifest
    return {
        "library_name": "vitcompress",
        "vitcompress": {
            "version": vitcompress.__version__,
            "source": manifest.source["name"],
            "architecture": manifest.source["architecture"],
            "family": manifest.plan.family,
            "store": manifest.store,
            "num_params": manifest.plan.size.student_params,
            "num_classes": subject.student.num_classes,
            "tensors_sha256": sha256_of(subject.tensors),
            "data_config": dict(manifest.data_config),
        },
    }


@contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """Fill a folder beside `out`, then move it there: a whole new folder or the old one, never a part.

    Yields:
        An empty folder to write to; removed if the block fails.

    Raises:
        VitcompressError: `out` is a file, or a folder with anything in it that an earlier export did not write.
    """
    check_folder(out)
    try:
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise VitcompressError(f"--out {out}: cannot write there: {error.strerror}.") from error
    old = beside / ".old"
    try:
        new = beside / "new"
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
        shutil.rmtree(beside, ignore_errors=True)


def check_folder(out: Path) -> None:
    """Make sure that nothing is lost where `out` is replaced.

    Raises:
        VitcompressError: something would be.
    """
    if out.exists() and not out.is_dir():
        raise VitcompressError(f"--out {out} is a file; --to hf writes a folder.")
    if not out.exists() or not any(out.iterdir()):
        return
    foreign = sorted({file.name for file in out.iterdir()} - FILES)
    try:
        tree = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        ours = isinstance(tree, dict) and tree.get("library_name") == "vitcompress"
    except (OSError, ValueError):
        ours = False
    if foreign or not ours:
        what = f"holds {shorten(foreign)}" if foreign else "was not written by vitcompress"
        raise VitcompressError(f"--out {out} {what}; it would be replaced.", hint="Name a new folder.")


def push_folder(folder: Path, repo: str) -> None:
    """Upload a folder to the Hugging Face Hub; the repository is made where there is none.

    Args:
        folder: as `write` left it.
        repo: USER/REPO.

    Raises:
        VitcompressError: the Hub cannot be reached, or refuses.
    """
    import huggingface_hub  # seldom wanted, and slow to import

    try:
        client = huggingface_hub.HfApi()
        client.create_repo(repo, exist_ok=True)
        client.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"Upload a model of vitcompress {vitcompress.__version__}"
        )
    except Exception as error:  # the Hub client raises dozens of types, of three libraries
        raise VitcompressError(
            f"--push {repo}: {first_line(error)} The folder {folder} is written.",
            hint="Log in with hf auth login; or upload it later: hf upload REPO FOLDER.",
        ) from error


HF = Format(write=write, suffix="", placing=replacing_folder)
