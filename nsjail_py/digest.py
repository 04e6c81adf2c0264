"""SHA-256 without the OpenSSL that hashlib loads first, a thirtieth of a command's time; `random` of the standard library does so, too."""

from __future__ import annotations

import importlib
from typing import Any, Protocol


class Digest(Protocol):
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


def sha256(data: bytes) -> Digest:
    made: Digest = _module().sha256(data)
    return made


def _module() -> Any:
    for name in ("_sha2", "_sha256"):  # Python 3.12 and later; 3.11
        try:
            return importlib.import_module(name)
        except ImportError:  # built without
            continue
    return importlib.import_module("hashlib")
