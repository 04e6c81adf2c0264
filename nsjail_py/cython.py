"""The strings of extensions that Cython made. From version 3.2 on it joins them, and compresses the whole if that is worth it: with
zlib, or from 3.3 on with a small LZSS of its own that has neither a header nor a length (Cython/LZSS.py). Where one begins is guessed;
what is none breaks off soon, or is no text.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator

MOST = 1 << 20
"""Bytes of strings in one extension."""
ZLIB = re.compile(rb"x[\x01\x5e\x9c\xda]")
LZSS = re.compile(rb"[\x0f\x1f\x2f\x3f\x4f\x5f\x6f\x7f\x8f\x9f\xaf\xbf\xcf\xdf\xef\xff](?=[\t\n -~]{4})")
"""Bits for four bytes as they are: at the beginning there is little yet to refer to."""
SHORT = 64
PLAIN = re.compile(rb"[\t\n -~]{%d,}" % SHORT)
MADE_BY_CYTHON = b"cython_runtime"


def texts(extension: bytes) -> Iterator[bytes]:
    """Whatever may be its strings, one behind the other; nothing of what Cython has not made."""
    if MADE_BY_CYTHON not in extension:
        return
    yield from (match[0] for match in PLAIN.finditer(extension))
    for match in ZLIB.finditer(extension):
        with contextlib.suppress(zlib.error):
            yield zlib.decompressobj().decompress(memoryview(extension)[match.start() :], MOST)
    for match in LZSS.finditer(extension):
        text = _lzss(extension, match.start())
        if PLAIN.match(text):
            yield text


def _lzss(data: bytes, at: int) -> bytes:
    """What is there until a reference leads to before the beginning. A bit of each flag tells a byte from a reference of two or three."""
    text = bytearray()
    with contextlib.suppress(IndexError):  # the end of the data
        while len(text) < MOST:
            flags, at = data[at], at + 1
            for bit in range(8):
                if flags >> bit & 1:
                    text.append(data[at])
                    at += 1
                    continue
                low, high, at = data[at], data[at + 1], at + 2
                if low < 0x80:
                    back, length = low, high
                elif high < 0x80:
                    back, length = 0x80 + (high << 2 & 0x180 | low & 0x7F), high & 0x1F
                else:
                    back, length, at = 0x80 + ((high & 0x7F) << 7 | low & 0x7F), data[at], at + 1
                length += 3
                start = len(text) - back - length
                if start < 0:
                    return bytes(text)
                text += text[start : start + length]
    return bytes(text)
