"""Types that data from elsewhere is read into, made ready where they are defined."""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


def prepared(kind: type[T]) -> type[T]:
    """msgspec finds out about a type when something is first read into it, and a second thread that comes meanwhile takes the half of it:
    the process dies (seen with 0.22). A module is imported by one thread, for which all others wait."""
    msgspec.json.Decoder(kind)
    return kind
