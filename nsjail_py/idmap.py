"""Which user and group ids this user namespace has. user_namespaces(7)"""

from __future__ import annotations

from pathlib import Path


def covers(first: int, count: int) -> bool:
    """Whether all of these ids, as users and as groups, are mapped."""
    return all(_mapped(Path(f"/proc/self/{file}").read_text(), first, count) for file in ("uid_map", "gid_map"))


def _mapped(text: str, first: int, count: int) -> bool:
    lines = [[int(word) for word in line.split()] for line in text.splitlines()]
    return any(inside <= first and first + count <= inside + length for inside, _, length in lines)
