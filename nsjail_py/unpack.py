"""What programs have said becomes values: MessagePack of JailExecutor's jobs, JSON of others. It is from anybody, so it is counted before
it is read: how much memory, time and stack a reader will need is known by then, and grows with the size alone."""

from __future__ import annotations

import itertools
import re
import sys
from array import array
from collections import defaultdict
from typing import Annotated, Any, TypeVar

import msgspec

from .errors import JailError, JobError
from .executor_inside import ARRAY, INTEGER, RESULT

T = TypeVar("T")

MOST_VALUES = 4 << 20
"""Of one result. An empty dictionary is one byte there, and eighty here; what a value takes is less than ninety in any case."""
MOST_LEVELS = 200
"""Of what lies in one another: readers recurse, and a caller may have raised the limit that would stop them before the stack's end."""
MOST_PROBES = 40
"""Places of its table that a dictionary tries for each key, on average. Two are usual, thirty for half a million numbers that end in many
zeros; and of the 2,000 powers of two that a float can say, every 61st has one hash."""
FEW_KEYS = 16
"""So many may collide."""

SIZES = bytearray(b"\1" * 256)
"""Bytes of a value by its first one, for arrays and maps without what is in them; 0 where a length follows (LENGTHS)."""
SIZES[0xA0:0xC0] = range(1, 33)
SIZES[0xC4:0xE0] = 0, 0, 0, 0, 0, 0, 5, 9, 2, 3, 5, 9, 2, 3, 5, 9, 3, 4, 6, 10, 18, 0, 0, 0, 3, 5, 3, 5
LENGTHS = {0xC4: (1, 2), 0xC5: (2, 3), 0xC6: (4, 5), 0xC7: (1, 3), 0xC8: (2, 4), 0xC9: (4, 6), 0xD9: (1, 2), 0xDA: (2, 3), 0xDB: (4, 5)}
"""Bytes of that length, and of all that comes before the data."""
ARRAYS, MAPS = frozenset([*range(0x90, 0xA0), 0xDC, 0xDD]), frozenset([*range(0x80, 0x90), 0xDE, 0xDF])
EXTENSIONS = {0xC7: 2, 0xC8: 3, 0xC9: 5, **dict.fromkeys(range(0xD4, 0xD9), 1)}
"""Where the byte is that says which."""
TEXTS = frozenset([*range(0xA0, 0xC0), 0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB])
"""And bytes: the hash of such a key is a secret of the caller's process."""
COUNTS = bytearray(b"\1" * 256)
"""As how many values a value counts: arrays and maps as one more than what is in them, extensions as four."""
for _first in (*ARRAYS, *MAPS):
    COUNTS[_first] = 2
for _first in EXTENSIONS:
    COUNTS[_first] = 4
NUMPY, NUMPY_COUNT = bytes([ARRAY]), 100
"""An array of numpy's counts more, however small: it takes so much longer than a number."""

RUN = 256
_sizes: defaultdict[int, bytes] = defaultdict(bytes)
for _first in {*range(256)} - ARRAYS - MAPS - EXTENSIONS.keys() - LENGTHS.keys():
    _sizes[SIZES[_first]] += b"\\x%02x" % _first
SINGLES = re.compile(b"(?s:(?:%s){%d})" % (b"|".join(b"[%s].{%d}" % (_sizes[size], size - 1) for size in sorted(_sizes)), RUN))
"""So many values in a row that hold no others and are short: what is all but all of a large list, at a fifth of the time."""

MOST_JSON = 1 << 20
"""Values, and keys, of one answer in JSON."""
STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
LEVELS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def decode(data: bytes) -> Any:
    """What a job has written. Raises JobError if it tells of an exception, and JailError for what is no result."""
    try:
        check(data)
        kind, *rest = READER.decode(data)
        if kind == RESULT:
            [value] = rest
            return value
        name, message, trace = msgspec.convert(rest, tuple[str, str, str])
    except Exception as error:  # whatever numpy says to a type that is none, and the caller's own recursion limit
        raise JailError(f"the job's result cannot be read: {error}") from None
    raise JobError(name, message, trace)


def check(data: bytes) -> None:
    """Raises ValueError for what would take its reader more memory, time or stack than the size of a result warrants."""
    at = begun = found = 0
    left = 1  # in the innermost array or map
    keys: array[int] | None = None  # of a large map: hash and size of each
    around: list[tuple[int, array[int] | None, int]] = []
    while True:
        if found > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values (an array counts as {NUMPY_COUNT}): return one array, text or bytes")
        while not left:
            if keys is not None:
                check_keys(keys)
            if not around:
                return
            left, keys, begun = around.pop()
        if keys is None and left % RUN == 0 and (run := SINGLES.match(data, at)):
            at, left, found = run.end(), left - RUN, found + RUN
            continue
        if keys is not None:
            if left % 2 == 0:
                begun = at
            else:
                keys.extend((hashed(data[begun:at]), at - begun))
        if at >= len(data):
            raise ValueError("it ends too early")
        first = data[at]
        left -= 1
        found += COUNTS[first]
        if first in EXTENSIONS and data[at + EXTENSIONS[first] : at + EXTENSIONS[first] + 1] == NUMPY:
            found += NUMPY_COUNT
        if first in ARRAYS or first in MAPS:
            if len(around) == MOST_LEVELS:
                raise ValueError(f"more than {MOST_LEVELS} levels")
            around.append((left, keys, begun))
            size = SIZES[first]
            inside = int.from_bytes(data[at + 1 : at + size], "big") if size > 1 else first & 0xF
            at += size
            left, keys = inside if first in ARRAYS else 2 * inside, None
            if first in MAPS and inside > FEW_KEYS:
                keys = array("q")
        elif SIZES[first]:
            at += SIZES[first]
        else:
            width, before = LENGTHS[first]
            at += before + int.from_bytes(data[at + 1 : at + 1 + width], "big")


def decode_json(text: bytes, kind: type[T]) -> T:
    """Raises ValueError for what is too much, too deep or no such kind."""
    check_json(text)
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from None


def check_json(text: bytes) -> None:
    """As `check`, for JSON, whose keys are all text."""
    bare, strings = STRINGS.subn(b"", text, MOST_JSON + 1)
    if max(strings, sum(map(bare.count, (b",", b":", b"[", b"{")))) > MOST_JSON:
        raise ValueError(f"more than {MOST_JSON} values")
    steps = memoryview(bare.translate(LEVELS, NO_BRACKETS)).cast("b")  # one in, or one out
    if max(itertools.accumulate(steps), default=0) > MOST_LEVELS:
        raise ValueError(f"more than {MOST_LEVELS} levels")


NOBODY_KNOWS = -1
"""In the place of a hash, which is never this number."""


def hashed(key: bytes) -> int:
    """The hash of a dictionary's key, where whoever chooses the key can know it."""
    if key[0] in TEXTS:
        return NOBODY_KNOWS
    [value] = READER.decode(b"\x81" + key + b"\xc0")  # an array is a tuple there
    return hash(value)


def check_keys(keys: array[int]) -> None:
    """Raises ValueError where a dictionary would be busy for longer than the keys' size warrants: too many hashes are the same, or lead
    through places that are taken. Goes as Objects/dictobject.c does, in a table of each size that it grows to."""
    hashes, sizes = keys[::2], keys[1::2]
    if len(hashes) - hashes.count(NOBODY_KNOWS) <= FEW_KEYS:
        return
    for bits in itertools.count(5):
        mask = (1 << bits) - 1
        room = (2 << bits) // 3
        taken, work = bytearray(1 << bits), MOST_PROBES * sum(sizes[:room])
        for hash_, size in zip(hashes[:room], sizes, strict=False):
            if hash_ == NOBODY_KNOWS:
                continue
            place, rest, probes = hash_ & mask, hash_ & (1 << 64) - 1, 0
            while taken[place]:
                rest >>= 5
                place = (place * 5 + rest + 1) & mask
                probes += 1
            work -= probes * size  # which comparing two keys may take
            if work < 0:
                raise ValueError("keys of a dictionary that collide")
            taken[place] = 1
        if room >= len(hashes):
            return


def _extension(code: int, data: memoryview) -> Any:
    if code == INTEGER:
        return int.from_bytes(data, "little", signed=True)
    if code == ARRAY:
        return _array(data)
    raise ValueError(f"extension {code}")


def _array(data: memoryview) -> Any:
    """Only of bytes that numpy could have written: other code behind an array takes them at their word."""
    import numpy as np

    name, shape, raw = ARRAY_READER.decode(data)
    dtype = np.dtype(name)
    if dtype.kind == "U" and raw and np.frombuffer(raw, dtype.byteorder + "u4").max() > sys.maxunicode:
        raise ValueError("text that is not Unicode")
    if dtype.kind == "b":
        return (np.frombuffer(raw, "u1") != 0).reshape(shape)
    return np.frombuffer(raw, dtype).reshape(shape).copy()


READER = msgspec.msgpack.Decoder(ext_hook=_extension)
ARRAY_READER = msgspec.msgpack.Decoder(
    tuple[
        Annotated[str, msgspec.Meta(pattern=r"^[<>|][biufcSUmM][0-9]{1,10}(\[[0-9]{0,10}[a-zA-Z]{1,2}\])?$")],
        Annotated[tuple[int, ...], msgspec.Meta(max_length=64)],
        bytes,
    ]
)
"""The types that are nothing but their bytes."""
