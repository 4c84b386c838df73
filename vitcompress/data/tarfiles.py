"""Read the images and labels of a tar file, and refuse members that cannot be either."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator

from vitcompress.data.readers import EXTENSIONS

MAX_IMAGE_BYTES = 256 << 20  # a photograph has a few MB
MAX_LABEL_BYTES = 4 << 10  # a number or a name
_MAX_NAME_BYTES = 1 << 20  # for long names, which tarfile reads into memory
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # splits a name as webdataset does
_METADATA = re.compile(r"__[^/]*__($|/)")  # members about the shard, which webdataset skips
_REMOTE = re.compile(r"(pipe|[a-z][a-z0-9+.-]+):")
BROKEN = (tarfile.TarError, OSError, ValueError, EOFError, OverflowError)  # raised by broken tar files


def is_remote(url: str) -> bool:
    """Return whether webdataset opens this as a URL or a command.

    Never for the absolute paths of files found in a folder.
    """
    return _REMOTE.match(url) is not None


def is_image(extension: str, image_key: str) -> bool:
    """Return whether files of an extension are images: those of `image_key`, or all known ones."""
    return extension == image_key if image_key else f".{extension}" in EXTENSIONS


class Member(tarfile.TarInfo):
    """A member of a tar file whose header claims no size that would fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        """Read a header.

        Raises:
            tarfile.ReadError: a sparse file, which can claim any size, or an impossible size.
        """
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{member.name} is a sparse file")
        if member.size < 0 or (member.type in _NAMES and member.size > _MAX_NAME_BYTES):
            raise tarfile.ReadError(f"{member.name} claims {member.size:,} bytes")
        return member


def find_members(
    tar: tarfile.TarFile,
    image_key: str,
    label_key: str,
    others: Counter[str] | None = None,
    dotted: dict[str, str] | None = None,
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield the images and labels of a tar file, in order.

    Args:
        tar: tar file, opened with `tarinfo=Member`.
        image_key: extension of the images; empty for any known one.
        label_key: extension of the labels.
        others: counts other extensions; updated in place.
        dotted: collects names of images with further dots, by sample: webdataset ends the sample's
            name at the first dot, so that `cat.v1.png` has the extension `v1.png`.

    Yields:
        Key of the sample, extension and member.

    Raises:
        tarfile.ReadError: a member is too large for an image or a label.
    """
    for member in tar:
        match = _KEY.fullmatch(member.name)
        if member.isreg() and match is not None and not _METADATA.match(member.name):
            key, extension = match[1], match[2].lower()
            image = is_image(extension, image_key)
            if image or extension == label_key:
                _check_size(member, MAX_IMAGE_BYTES if image else MAX_LABEL_BYTES)
                yield key, extension, member
            else:
                if others is not None:
                    others[extension] += 1
                if dotted is not None and not image_key and is_image(extension.rpartition(".")[2], ""):
                    dotted[key] = member.name
        tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every member


def dotted_error(name: str) -> str:
    """Return why an image with dots in its name is in no sample."""
    extension = name.rpartition("/")[2].partition(".")[2]
    hint = f"--image-key {extension} reads it"
    return f"{name} is no image: from the first dot on, its extension is .{extension} ({hint})"


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the content of a member that `find_members` yielded."""
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()


def _check_size(member: tarfile.TarInfo, max_bytes: int) -> None:
    if member.issparse():  # a PAX sparse file, which only tarfile recognizes
        raise tarfile.ReadError(f"{member.name} is a sparse file")
    if member.size > max_bytes:
        raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes, more than the limit of {max_bytes:,}")
