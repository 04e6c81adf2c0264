"""Archives that lie: what an image is packed in, read without believing a header.

No more is read into memory than an entry's header needs, no entry stands before the one before it, and what a layer unpacks to is counted
and its digest taken. opencontainers/image-spec, layer.md
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NoReturn, cast

MAX_BYTES = 8 * 1024**3
"""Of all that one image unpacks to."""
MAX_HEADER = 32 * 1024
"""Of what stands before an entry (long names, attributes), which is read into memory."""
MAX_GLOBAL = 100
"""Attributes for all entries that follow, which stay there."""
PIECE = 256 * 1024
DIGITS = re.compile(rb"\d{256}")
"""No name, number or time has so many in a row. tarfile's search in a header that has is quadratic (CVE-2024-6232)."""


class Refused(Exception):
    """Something in an image is not as it has to be."""


def refuse(name: str, why: str) -> NoReturn:
    raise Refused(f"{name!r:.200}: {why}")


class Part(io.RawIOBase):
    """The data of one entry of a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.at, self.end = file, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self.file.fileno(), min(len(buffer), self.end - self.at), self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class Bounded:
    """An archive for tarfile, which believes every header: no more of what stands before an entry than there has to be, and no next entry
    that stands before the last one (CVE-2025-8194). The data of entries does not go through tarfile."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.at, self.left = file, 0, MAX_HEADER
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise Refused(f"a header of more than {MAX_HEADER} bytes")
        data = self.data(size)
        if DIGITS.search(data):
            raise Refused("a header with a number that is none")
        self.last = data
        return data

    def data(self, size: int) -> bytes:
        found = self.file.read(size)
        self.at += len(found)
        return found

    def tell(self) -> int:
        return self.at

    def seek(self, to: int) -> None:
        if to < self.at:
            raise Refused("an entry stands before the one before it")
        self._skip(to)

    def _skip(self, to: int) -> None:
        self.at = self.file.seek(to)


class Hashed(Bounded):
    """A layer as it unpacks: counted, and its digest taken."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        super().__init__(file)
        self.name, self.digest = name, hashlib.sha256()

    def data(self, size: int) -> bytes:
        found = super().data(size)
        if self.at > MAX_BYTES:
            refuse(self.name, f"unpacks to more than {MAX_BYTES} bytes")
        self.digest.update(found)
        return found

    def _skip(self, to: int) -> None:
        while self.at < to and self.data(min(PIECE, to - self.at)):
            pass


def entries(file: Bounded) -> Iterator[tarfile.TarInfo]:
    """The entries of an archive, none of which is kept; the file is where their data begins."""
    with tarfile.open(mode="r:", fileobj=cast("IO[bytes]", file)) as archive:
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]
            if member.size < 0 or len(archive.pax_headers) > MAX_GLOBAL:
                refuse(member.name, f"has a negative size, or more than {MAX_GLOBAL} attributes before it that are for all")
            file.left = MAX_HEADER
            yield member
        if any(file.last):  # tarfile takes a broken header for the end, which is zeros or nothing
            raise Refused("a header that is none")


@contextlib.contextmanager
def plain(file: io.BufferedReader, name: str) -> Iterator[IO[bytes]]:
    """A layer without its compression, which its first bytes tell."""
    head = file.peek(4)[:4]
    if head[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield unpacked  # type: ignore[misc]
    elif head == b"\x28\xb5\x2f\xfd":
        refuse(name, "is compressed with zstd, which this Python cannot read; `skopeo copy` or `docker save` gives another form")
    else:
        yield file
