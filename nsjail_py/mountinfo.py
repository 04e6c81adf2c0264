"""The mounts of this process, as /proc/self/mountinfo tells them. proc_pid_mountinfo(5)"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

_ESCAPE = re.compile(r"\\([0-7]{3})")


class Entry(msgspec.Struct, frozen=True):
    """One mount: which part of which file system is seen where, and how."""

    root: str
    """The directory of the file system that is mounted."""
    target: str
    """Where it is mounted."""
    options: frozenset[str]
    """Flags of this mount (`ro`, `nosuid` ...)."""
    kind: str
    """The file system's type."""
    super_options: frozenset[str]
    """Flags of the file system itself; for cgroup v1 its controllers are among them."""

    @property
    def read_only(self) -> bool:
        return "ro" in self.options or "ro" in self.super_options


def unescape(text: str) -> str:
    """Spaces, tabs, newlines and backslashes are written as three octal digits."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def parse(text: str) -> list[Entry]:
    """The lines of a mountinfo file, in order: of two mounts on one target the later covers the earlier."""
    entries = []
    for line in text.split("\n"):
        left, separator, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if separator and len(before) >= 6 and len(after) >= 3:
            entries.append(
                Entry(unescape(before[3]), unescape(before[4]), frozenset(before[5].split(",")), after[0], frozenset(after[2].split(",")))
            )
    return entries


def entries() -> list[Entry]:
    """The mounts of this process."""
    return parse(Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape"))
