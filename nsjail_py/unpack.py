"""What a job of JailExecutor has written becomes values: MessagePack from anybody, so it is counted before it is read."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from .errors import JailError, JobError
from .executor_inside import ARRAY, INTEGER, RESULT

MOST_VALUES = 4 << 20
"""Of one result. An empty dictionary is one byte there, and eighty here; what a value takes is less than ninety in any case."""
PLAIN = frozenset("biufcSUmM?")
"""Kinds of numpy's types that are nothing but their bytes."""

SIZES = bytearray(b"\1" * 256)
"""Bytes of a value by its first one, for arrays and maps without what is in them; 0 where a length follows (LENGTHS)."""
SIZES[0xA0:0xC0] = range(1, 33)
SIZES[0xC4:0xE0] = 0, 0, 0, 0, 0, 0, 5, 9, 2, 3, 5, 9, 2, 3, 5, 9, 3, 4, 6, 10, 18, 0, 0, 0, 3, 5, 3, 5
LENGTHS = {0xC4: (1, 2), 0xC5: (2, 3), 0xC6: (4, 5), 0xC7: (1, 3), 0xC8: (2, 4), 0xC9: (4, 6), 0xD9: (1, 2), 0xDA: (2, 3), 0xDB: (4, 5)}
"""Bytes of that length, and of all that comes before the data."""
COUNTS = bytearray(b"\1" * 256)
"""As how many values a value counts: arrays and maps as one more than what is in them, extensions as they can be arrays of numpy's."""
COUNTS[0x80:0xA0], COUNTS[0xDC:0xE0] = b"\2" * 32, b"\2" * 4
COUNTS[0xC7:0xCA], COUNTS[0xD4:0xD9] = b"\4" * 3, b"\4" * 5


def decode(data: bytes) -> Any:
    """What a job has written. Raises JobError if it tells of an exception, and JailError for what is no result."""
    try:
        count(data)
        kind, *rest = msgspec.msgpack.decode(data, ext_hook=_extension)
        if kind == RESULT:
            [value] = rest
            return value
        name, message, trace = msgspec.convert(rest, tuple[str, str, str])
    except Exception as error:  # RecursionError, and whatever numpy says to a type that is none
        raise JailError(f"the job's result cannot be read: {error}") from None
    raise JobError(name, message, trace)


def count(data: bytes) -> None:
    """Raises ValueError for more than MOST_VALUES values."""
    if len(data) <= MOST_VALUES:  # less cannot be more
        return
    at = found = 0
    while at < len(data):
        first = data[at]
        found += COUNTS[first]
        if found > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values: return an array, text or bytes")
        if SIZES[first]:
            at += SIZES[first]
        else:
            width, before = LENGTHS[first]
            at += before + int.from_bytes(data[at + 1 : at + 1 + width], "big")


def _extension(code: int, data: memoryview) -> Any:
    if code == INTEGER:
        return int.from_bytes(data, "little", signed=True)
    if code == ARRAY:
        return _array(data)
    raise ValueError(f"extension {code}")


def _array(data: memoryview) -> Any:
    import numpy as np

    name, shape, raw = msgspec.msgpack.decode(data, type=_Array)
    dtype = np.dtype(name)
    if dtype.kind not in PLAIN or dtype.names is not None:
        raise ValueError(f"an array of {name!r}")
    return np.frombuffer(raw, dtype).reshape(shape).copy()


_Array = tuple[Annotated[str, msgspec.Meta(max_length=100)], Annotated[tuple[int, ...], msgspec.Meta(max_length=64)], bytes]
