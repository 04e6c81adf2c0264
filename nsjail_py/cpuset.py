"""Lists of processors as the kernel writes them: `0-1,4`. cpuset(7), the section on formats."""

from __future__ import annotations

import re

MOST = 8192
"""CONFIG_NR_CPUS of the largest kernels for x86-64."""


def parse(text: str) -> frozenset[int]:
    """The numbers in a list. Raises ValueError with what is wrong with it."""
    found: set[int] = set()
    for part in text.split(","):
        written = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part, re.ASCII)
        if not written:
            raise ValueError("is no list of processors: write numbers and ranges, such as 0-1,4")
        first, last = int(written[1]), int(written[2] or written[1])
        if not first <= last < MOST:
            raise ValueError(f"has a range that is none: {part}")
        found.update(range(first, last + 1))
    return frozenset(found)


def write(numbers: frozenset[int]) -> str:
    """The list of these numbers, without ranges."""
    return ",".join(map(str, sorted(numbers)))
