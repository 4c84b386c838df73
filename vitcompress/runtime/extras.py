"""Optional packages: which extra installs them, and whether they are there."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from vitcompress.errors import VitcompressError

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "datasets": ("datasets",),
    "webdataset": ("webdataset",),
    "executorch": ("executorch",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}


def missing_packages(extra: str) -> list[str]:
    """Packages of an extra that are not installed.

    Args:
        extra: a key of `EXTRAS`.
    """
    return [package for package in EXTRAS[extra] if find_spec(package) is None]


def install_hint(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'vitcompress[{extra}]'"


def require_extra(extra: str, needed_by: str, kind: type[VitcompressError] = VitcompressError) -> None:
    """Make sure that the packages of an extra are installed.

    Args:
        extra: a key of `EXTRAS`.
        needed_by: what needs them, as the user named it.
        kind: the error to raise.

    Raises:
        VitcompressError: of `kind`; a package is missing.
    """
    missing = missing_packages(extra)
    if missing:
        names = f"package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}"
        raise kind(f"{needed_by} needs the {names}.", hint=install_hint(extra))
