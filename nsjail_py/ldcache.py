"""The loader's cache for a minimal root: where each of its libraries is. Without one ld.so tries a dozen directories for the first
library of every program; with the host's it would tell what is installed there. ld.so(8); the format is that of glibc's dl-cache.h
"""

from __future__ import annotations

import itertools
import os
import re
import struct
from collections.abc import Iterable

MAGIC = b"glibc-ld.so.cache1.1"
LITTLE_ENDIAN = 2
HEAD = struct.Struct("<20sIIB3xI12x")
"""Magic, entries, bytes of text, endianness, extensions."""
ENTRY = struct.Struct("<iIIIQ")
"""Kind, offset of the name, offset of the path, and two that say nothing here: version of the system, capabilities of the processor."""
KINDS = {"x86_64": 0x0303, "aarch64": 0x0A03}
"""A library for glibc and a 64-bit processor."""


def of(paths: Iterable[str]) -> bytes:
    """The cache for these libraries, known by their file names; empty on a processor that it is not known for."""
    kind = KINDS.get(os.uname().machine)
    if kind is None:
        return b""
    known: dict[str, str] = {}
    for path in paths:
        known.setdefault(os.path.basename(path), path)
    names = sorted(known, key=_order, reverse=True)
    texts = [os.fsencode(text) + b"\0" for name in names for text in (name, known[name])]
    offsets = list(itertools.accumulate(map(len, texts), initial=HEAD.size + ENTRY.size * len(names)))
    entries = (ENTRY.pack(kind, offsets[2 * number], offsets[2 * number + 1], 0, 0) for number in range(len(names)))
    head = HEAD.pack(MAGIC, len(names), sum(map(len, texts)), LITTLE_ENDIAN, 0)
    return b"".join((head, *entries, *texts))


def _order(name: str) -> list[tuple[int, int]]:
    """The loader searches by halves: digits count as one number, which comes behind any letter."""
    parts = re.findall(r"[0-9]+|[^0-9]", name)
    return [(1, int(part)) if part.isdecimal() else (0, ord(part)) for part in parts]
