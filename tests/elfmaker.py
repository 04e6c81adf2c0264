"""Small ELF files, well-formed or not, for tests of what reads them."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

NEEDED, STRTAB, RUNPATH = 1, 5, 29


def elf(needed: Sequence[str] = (), runpath: str | None = None, loader: str | None = None, times: int = 1) -> bytes:
    """A shared object that asks for these libraries, in these folders (so many times), with this loader; there is no code in it."""
    strings, tags = b"\0", []
    for tag, text in [*((NEEDED, name) for name in needed), *([(RUNPATH, runpath)] if runpath else [])]:
        tags.append((tag, len(strings)))
        strings += os.fsencode(text) + b"\0"
    tags += tags[-1:] * (times - 1)
    headers = 3 if loader else 2
    dynamic_at = 64 + 56 * headers
    strings_at = dynamic_at + 16 * (len(tags) + 2)
    loader_at = strings_at + len(strings)
    tail = (loader or "").encode() + b"\0"
    end = loader_at + len(tail)
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in [*tags, (STRTAB, strings_at), (0, 0)])
    table = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, end, end, 4096)
    table += struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), 8)
    if loader:
        table += struct.pack("<IIQQQQQQ", 3, 4, loader_at, loader_at, loader_at, len(tail), len(tail), 1)
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, headers, 0, 0, 0)
    return header + table + dynamic + strings + tail
