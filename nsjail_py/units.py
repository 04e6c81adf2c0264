"""Sizes and times as people write them."""

from __future__ import annotations

import math
import re

SIZES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "min": 60.0, "h": 3600.0}
MOST_BYTES = (1 << 63) - 1
MOST_SECONDS = 10 * 365 * 86400.0

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(value: int | str) -> int:
    """Bytes. `64M` and `64MiB` are 64 * 1024**2; `64MB` is refused, since readers disagree. Raises ValueError with one line."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a size: a whole number of bytes, or text such as '64M'")
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        unit = match[2].lower().removesuffix("ib") if match else ""
        if match is None or unit not in SIZES:
            hint = "; MB could mean two things: write MiB or M" if match and match[2].lower()[1:] == "b" else ""
            raise ValueError(f"{value!r} is not a size: a number with B, K, M, G or T (or KiB, MiB, ...){hint}")
        exact = float(match[1]) * SIZES[unit] if "." in match[1] else int(match[1]) * SIZES[unit]
        if exact != int(exact):
            raise ValueError(f"{value!r} is not a whole number of bytes")
        value = int(exact)
    if not 0 <= value <= MOST_BYTES:
        raise ValueError(f"{value} is not a size between 0 and 2**63 - 1 bytes")
    return value


def parse_time(value: float | str) -> float:
    """Seconds. `1.5`, `500ms`, `2m`, `1h`. Raises ValueError with one line."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a time: a number of seconds, or text such as '500ms'")
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        if match is None or match[2].lower() not in TIMES:
            raise ValueError(f"{value!r} is not a time: a number with us, ms, s, m or h")
        value = float(match[1]) * TIMES[match[2].lower()]
    if not math.isfinite(value) or not 0 <= value <= MOST_SECONDS:
        raise ValueError(f"{value!r} is not a time between 0 seconds and ten years")
    return float(value)


def format_size(size: int) -> str:
    """The shortest exact way to write it: 67108864 -> `64M`."""
    for unit in ("T", "G", "M", "K"):
        if size and size % SIZES[unit.lower()] == 0:
            return f"{size // SIZES[unit.lower()]}{unit}"
    return f"{size}B"


def format_time(seconds: float) -> str:
    """`500ms`, `1.5s`."""
    return f"{seconds * 1000:g}ms" if seconds < 1 else f"{seconds:g}s"
