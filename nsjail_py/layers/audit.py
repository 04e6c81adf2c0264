"""Audit telemetry: what a Python script imported, opened, connected to and tried to start, as its own interpreter tells (PEP 578).

For a friendlier picture and nothing else: the hook lives in the payload's memory, and whoever knows it passes it (docs/audit.md). So the
result says what an honest program did, and proves nothing of a hostile one. What it left is read with bounds: it may be anything.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nsjail_py._native import ffi, lib
from nsjail_py.plan import OrderFile, memory_file

from . import audit_inside

if TYPE_CHECKING:
    from nsjail_py.policy import Policy

HERE = Path(__file__).parent
KINDS = {
    lib.AUDIT_IMPORT: "imports",
    lib.AUDIT_FILE: "files",
    lib.AUDIT_SOCKET: "sockets",
    lib.AUDIT_PROCESS: "processes",
    lib.AUDIT_NATIVE: "libraries",
}
MOST_RECORDS = 10_000
SIZE = ffi.sizeof("struct audit")
WORDS = {
    lib.AUDIT_SOCKET: (
        ("@local-sockets", "@inet-sockets"),
        'the policy has no sockets; [syscalls] allow = [..., "@local-sockets" or "@inet-sockets"]',
    ),
    lib.AUDIT_PROCESS: (("@processes",), 'the policy has no processes; [syscalls] allow = [..., "@processes"], exec = true'),
}
"""What `audit = "refuse"` refuses, unless the policy has one of these sets: that which the filter would refuse anyway."""


class Audit(msgspec.Struct, frozen=True):
    """What the interpreter told. `trusted` is not among the fields: a program can write here whatever it likes."""

    counts: dict[str, int]
    """Events of each kind."""
    imports: tuple[str, ...]
    files: tuple[str, ...]
    sockets: tuple[str, ...]
    """Event and address."""
    processes: tuple[str, ...]
    """Event and program."""
    libraries: tuple[str, ...]
    """Opened through ctypes."""
    cut: bool
    """Whether there was more, or something else than records."""


class Page:
    """The memory file of one run, and what is sent along with its order."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._told: Audit | None = None
        self.fd = memory_file("audit")
        try:
            os.ftruncate(self.fd, SIZE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(self.fd)
            raise

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """It is read; the handle of a run may live on in circles."""
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def passed(self) -> tuple[tuple[int, int], ...]:
        """Number inside, and our descriptor."""
        return ((audit_inside.PAGE, self.fd),)

    def files(self) -> tuple[OrderFile, ...]:
        return (OrderFile(".audit.py", (HERE / "audit_inside.py").read_bytes()),)

    def arguments(self) -> list[str]:
        """What stands before the script."""
        return ["/app/.audit.py", "\n".join(f"{kind}={words}" for kind, words in refused(self.policy).items())]

    def read(self) -> Audit:
        """After the end of the run; it is closed then."""
        if self._told is None:
            self._told = parse(os.pread(self.fd, SIZE, 0))
            self.close()
        return self._told


def refused(policy: Policy) -> dict[int, str]:
    """Kinds of events that are refused, with the words that name the line to change."""
    if policy.python.audit != "refuse" or policy.syscalls is None:
        return {}
    return {kind: words for kind, (sets, words) in WORDS.items() if not any(name in policy.syscalls.allow for name in sets)}


def parse(data: bytes) -> Audit:
    """Whatever the bytes are."""
    found: dict[str, dict[str, None]] = {name: {} for name in KINDS.values()}
    page = ffi.new("struct audit *")
    ffi.buffer(page)[: len(data)] = data
    counts = {name: int(page.counts[kind]) for kind, name in KINDS.items()}
    records, at, number = bytes(ffi.buffer(page.records)), 0, 0
    end = min(page.used, lib.AUDIT_ROOM)
    cut = bool(page.cut) or page.used > lib.AUDIT_ROOM or page.magic != lib.AUDIT_MAGIC
    while at + 3 <= end:
        kind, size = records[at] - 1, int.from_bytes(records[at + 1 : at + 3], "little")
        if kind not in KINDS or size > lib.AUDIT_LONGEST or at + 3 + size > end or number >= MOST_RECORDS:
            cut = True
            break
        found[KINDS[kind]][records[at + 3 : at + 3 + size].decode(errors="backslashreplace")] = None
        at, number = at + 3 + size, number + 1
    return Audit(counts=counts, cut=cut, **{name: tuple(entries) for name, entries in found.items()})
