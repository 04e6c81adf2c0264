"""Sizes and times as people write them: `64M` is 64 MiB, as in systemd and docker; `500ms`, `1.5` and `2m` are times."""

from __future__ import annotations

import math
import re

SIZE_STEPS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
TIME_STEPS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
MAX_SIZE = 2**63 - 1
MAX_TIME = 10 * 365 * 86400.0
SIZE_HELP = "write bytes, or a number with K, M, G or T (1024 each), such as 64M"
TIME_HELP = "write seconds, or a number with ms, s, m, h or d, such as 500ms"
WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", re.ASCII)
DIGITS = 32
"""More than any value in range needs; it keeps a number of a million digits from being computed."""


def parse_size(value: str | int | float) -> int:
    """Bytes. Raises ValueError with one line that says what is wrong and what would be right."""
    if isinstance(value, str):
        number, unit = _split(value, "size", SIZE_HELP)
        if re.fullmatch("[KMGT]B", unit.upper()):
            raise ValueError(f"size {value!r} is ambiguous (1000 or 1024?): write {unit[0].upper()} or {unit[0].upper()}iB, which is 1024")
        letter = unit.upper().removesuffix("IB") if len(unit) == 3 else unit.upper().removesuffix("B")
        if letter not in SIZE_STEPS:
            raise ValueError(f"size {value!r} has the unknown unit {unit!r}: {SIZE_HELP}")
        if "." not in number:
            return _checked_size(int(number) * SIZE_STEPS[letter], value)
        return _checked_size(float(number) * SIZE_STEPS[letter], value)
    _refuse_other_types(value, "size", SIZE_HELP)
    return _checked_size(value, value)


def parse_time(value: str | float) -> float:
    """Seconds. Raises ValueError with one line that says what is wrong and what would be right."""
    if isinstance(value, str):
        number, unit = _split(value, "time", TIME_HELP)
        if unit not in TIME_STEPS:
            raise ValueError(f"time {value!r} has the unknown unit {unit!r}: {TIME_HELP}")
        seconds = float(number) / 1000 if unit == "ms" else float(number) * TIME_STEPS[unit]
    else:
        _refuse_other_types(value, "time", TIME_HELP)
        # An int too large for a float would be an OverflowError; it is far out of range anyway.
        seconds = math.inf if isinstance(value, int) and value > MAX_TIME else float(max(value, -1))
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"time {_shown(value)} is not a time: it must be a number of at least 0")
    if seconds > MAX_TIME:
        raise ValueError(f"time {_shown(value)} is too long: at most 10 years; for no limit write 'unlimited'")
    return seconds


def format_size(size: int | None) -> str:
    """As `parse_size` reads it: `64M`, `1.5G`, `1000`; None is `unlimited`."""
    if size is None:
        return "unlimited"
    for letter in "TGMK":
        tenths, rest = divmod(size * 10, SIZE_STEPS[letter])
        if tenths >= 10 and rest == 0:
            return f"{tenths // 10}.{tenths % 10}{letter}" if tenths % 10 else f"{tenths // 10}{letter}"
    return str(size)


def format_time(seconds: float | None) -> str:
    """As `parse_time` reads it: `250ms`, `1.5s`, `2m`; None is `unlimited`."""
    if seconds is None:
        return "unlimited"
    if 0 < seconds < 1:
        return f"{seconds * 1000:.12g}ms"
    for unit in ("d", "h", "m"):
        if seconds >= TIME_STEPS[unit] and seconds % TIME_STEPS[unit] == 0:
            return f"{int(seconds / TIME_STEPS[unit])}{unit}"
    return f"{seconds:.12g}s"


def _split(text: str, kind: str, advice: str) -> tuple[str, str]:
    found = WRITTEN.fullmatch(text.strip(" ")) if len(text) <= 2 * DIGITS else None
    if not found or len(found[1]) > DIGITS:
        raise ValueError(f"{kind} {_shown(text)} is not a {kind}: {advice}")
    return found[1], found[2]


def _refuse_other_types(value: object, kind: str, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{kind} {_shown(value)} is not a {kind}: {advice}")


def _checked_size(size: int | float, written: object) -> int:
    if isinstance(size, float) and not math.isfinite(size):
        raise ValueError(f"size {_shown(written)} is not a size: {SIZE_HELP}")
    if size < 0:
        raise ValueError(f"size {_shown(written)} is negative")
    if size > MAX_SIZE:
        raise ValueError(f"size {_shown(written)} is too large: at most {MAX_SIZE} bytes; for no limit write 'unlimited'")
    if size != int(size):
        raise ValueError(f"size {_shown(written)} is not a whole number of bytes")
    return int(size)


def _shown(value: object) -> str:
    # str() of an int of more than 4300 digits raises; no such number is worth printing.
    text = "of more than 100 digits" if isinstance(value, int) and abs(value) > 10**100 else repr(value)
    return text if len(text) <= 60 else text[:56] + "..."
