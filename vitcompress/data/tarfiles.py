"""Which images and labels are in a tar file?  Its members, held against what an image or a label can be."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator

from vitcompress.data.readers import EXTENSIONS

MOST_IMAGE_BYTES = 256 << 20  # a photograph has a few MB
MOST_LABEL_BYTES = 4 << 10  # a number or a name
_MOST_NAME_BYTES = 1 << 20  # of long names, which tarfile reads whole
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # as webdataset splits a name
_OF_THE_SHARD = re.compile(r"__[^/]*__($|/)")  # as webdataset leaves out what tells of the shard
_REMOTE = re.compile(r"(pipe|[a-z][a-z0-9+.-]+):")
BROKEN = (tarfile.TarError, OSError, ValueError, EOFError, OverflowError)  # what a tar file that is none raises


def is_remote(url: str) -> bool:
    """Whether webdataset has to open it: a URL, or a command. Paths that were found on the disk are absolute: never."""
    return _REMOTE.match(url) is not None


class Member(tarfile.TarInfo):
    """A member whose header does not claim what would fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        """Read a header.

        Raises:
            tarfile.ReadError: a sparse file, which can claim any size, or one that is less than empty.
        """
        found = super().frombuf(buf, encoding, errors)
        if found.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{found.name} is a sparse file")
        if found.size < 0 or (found.type in _NAMES and found.size > _MOST_NAME_BYTES):
            raise tarfile.ReadError(f"{found.name} claims {found.size:,} bytes")
        return found


def wanted(
    tar: tarfile.TarFile, image_key: str, label_key: str, others: Counter[str] | None = None
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The images and labels of a tar file, in order: key of the sample, extension, member.

    Args:
        tar: opened with `tarinfo=Member`.
        image_key: extension of the images; empty for any that is known.
        label_key: extension of the labels.
        others: extensions that are neither are counted in it.

    Raises:
        tarfile.ReadError: one is larger than any image, or any label.
    """
    for member in tar:
        found = _KEY.fullmatch(member.name)
        if member.isreg() and found is not None and not _OF_THE_SHARD.match(member.name):
            key, extension = found[1], found[2].lower()
            is_image = extension == image_key if image_key else f".{extension}" in EXTENSIONS
            if is_image or extension == label_key:
                _check_size(member, MOST_IMAGE_BYTES if is_image else MOST_LABEL_BYTES)
                yield key, extension, member
            elif others is not None:
                others[extension] += 1
        tar.members = []  # type: ignore[attr-defined]  # or each would be kept


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What is in a member of `wanted`."""
    file = tar.extractfile(member)
    assert file is not None  # it is a regular one
    return file.read()


def _check_size(member: tarfile.TarInfo, most: int) -> None:
    if member.issparse():  # of the newer kind, which its header does not tell
        raise tarfile.ReadError(f"{member.name} is a sparse file")
    if member.size > most:
        raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes, at most {most:,} are read")
