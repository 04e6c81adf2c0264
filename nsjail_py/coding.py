"""A script's text as a file: its first two lines may name the encoding (PEP 263), and an interpreter goes by that."""

from __future__ import annotations

import os

from .errors import PolicyError


def as_file(source: str | bytes) -> bytes:
    """What an interpreter reads as this text. Where the encoding that it names is none for it, the file names UTF-8 in its place.
    Raises PolicyError for a path."""
    if not isinstance(source, str):
        if isinstance(source, os.PathLike):
            raise PolicyError(f"source = {source!r}: the text of a script, not its path: Path(...).read_bytes()")
        return source
    data = source.encode()
    if b"coding" not in b"".join(data.split(b"\n", 2)[:2]):
        return data
    import re

    try:
        name = _named(data)
        told = source.encode(name)
        if _named(told) == name and told.decode(name) == source:
            return told
    except (SyntaxError, UnicodeError, LookupError):
        pass
    return re.sub(r"^(\ufeff?[ \t\f]*#.*?coding[:=][ \t]*)[-\w.]+", r"\1utf-8", source, count=1, flags=re.ASCII | re.MULTILINE).encode()


def _named(data: bytes) -> str:
    from io import BytesIO
    from tokenize import detect_encoding

    return detect_encoding(BytesIO(data).readline)[0]
