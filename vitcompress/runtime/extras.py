"""Optional packages: which extra installs them, and whether they are there."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
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
    return [package for package in EXTRAS[extra] if not _is_installed(package)]


def _is_installed(package: str) -> bool:
    """Return whether a package is there; any folder of its name can be imported like one."""
    spec = find_spec(package)
    if spec is None or getattr(spec, "origin", package) is not None:
        return spec is not None
    try:  # a package without __init__.py
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


def install_hint(extra: str) -> str:
    """Return the command that installs an extra, and what else looks like one of its packages."""
    command = f"pip install 'vitcompress[{extra}]'"
    folders = [folder for package in missing_packages(extra) for folder in _folders_named(package)]
    others = f" (The folder {folders[0]} is no package.)" if folders else ""
    return command + others


def _folders_named(package: str) -> list[str]:
    """Return the folders of a package's name that Python would import."""
    spec = find_spec(package)
    return list(getattr(spec, "submodule_search_locations", None) or ())


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
