"""The launcher, and the extension of templates, built so that any one call of them can be made to fail, and what they called is known."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import socket
import struct
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "native"
CC = os.environ.get("COVERING_CC", "gcc")
ROLES = ("launcher", "init", "program", "template", "job's init", "job")
IN_EXTENSION = ("template", "snapshot")
PASSED = 6
"""The number by which a template knows the page: the next after those that it has anyway."""
CANNOT_FAIL = frozenset(
    [
        "__errno_location",
        "__sched_cpucount",
        "__stack_chk_fail",
        "_exit",
        "exit",
        "memchr",
        "memcmp",
        "memcpy",
        "memmove",
        "memset",
        "snprintf",
        "strchr",
        "strcmp",
        "strlen",
        "strncmp",
        "strrchr",
        "atoi",
        "free",
        "strstr",
        "__isoc99_sscanf",
        "dirfd",
        "sysconf",
        "srand",
        "srand48",
        "srandom",
        "strtol",
        "strtoul",
        "strtoull",
        "__isoc23_strtol",  # what a newer C library calls the same
        "__isoc23_strtoul",
        "__isoc23_strtoull",
        "__isoc23_sscanf",
        "sigaddset",
        "sigemptyset",
        "getegid",
        "geteuid",
        "getpid",
        "getppid",
        "_setjmp",
        "_longjmp",
    ]
)
"""What the launcher calls and has no failure. Everything else is made to fail: a call that is new, too."""
NULL_ON_FAILURE = frozenset({"fdopendir", "readdir", "opendir", "realloc"})
DONE_ALL_THE_SAME = frozenset({"close", "closedir", "munmap"})
"""The kernel lets go of a descriptor also when close answers with an error."""
SUB = {
    "prctl": "a",
    "fcntl": "b",
    "ioctl": "b",
    "clock_gettime": "a",
    "setrlimit": "a",
    "timerfd_create": "a",
    "epoll_ctl": "b",
    "open": "asks_for_a_number((const char *)a)",
}
"""What tells what the call is about."""
HEAD = struct.Struct("=4IqIIII")
ENTRY = struct.Struct("=4Iq")
LOG = 65536
PRETENDED = 0xFFFF
"""In the place of an errno: the call is not made, and says that it was."""


class Point(NamedTuple):
    """One call in one process: the nth of its kind there."""

    role: str
    cell: int
    call: str
    sub: int
    nth: int

    @property
    def name(self) -> str:
        """The system call where it is known by number, else the function and what it is about."""
        if self.call == "syscall":
            from nsjail_py.syscalls import name_of

            return name_of(self.sub)
        return f"{self.call}:{self.sub}" if self.call in SUB and (self.call, self.sub) != ("open", 0) else self.call

    def __str__(self) -> str:
        return f"{self.role}{self.cell or ''} {self.name} {self.nth}"


BECOMES = {
    # Shares the template's memory until its exec, and the template waits for that long.
    "clone": "uint32_t kept = role; cell++; role = JOB_INIT; long result = {really}; role = kept; return result;",
    "fork": "long result = {really}; if (result == 0 && role == JOB_INIT) role = JOB; return result;",
}
"""Calls after which somebody is another."""


def _wrapper(name: str) -> str:
    sub, failed = SUB.get(name, "0"), "0" if name in NULL_ON_FAILURE else "-1"
    exempt = "a == 1 ? DONE : " if name == "clock_gettime" else ""  # CLOCK_MONOTONIC, which is no call into the kernel
    really = f"real_{name}(a, b, c, d, e, f)"
    fail = f"{{ int error = errno; {really}; errno = error; return {failed}; }}" if name in DONE_ALL_THE_SAME else f"return {failed};"
    fate = f"enum fate fate = {exempt}due(CALL_{name}, (int){sub});"
    return (
        f'long real_{name}(long, ...) __asm__("{name}");\n'
        f"long faulty_{name}(long a, long b, long c, long d, long e, long f) {{\n"
        f"\t{fate}\n\tif (fate == FAKED) return 0;\n\tif (fate == FAILED) {fail}\n"
        f"\t{BECOMES.get(name, 'return {really};').format(really=really)}\n}}\n"
    )


class Shim:
    """The programs, and the page through which they are told what to do."""

    def __init__(self, directory: Path) -> None:
        self.program, self.extension = directory / "nsjail-launcher", directory / "_template.abi3.so"
        self.control = directory / "control"
        self.uses: dict[str, set[str]] = {}
        """What each file of native/ has from elsewhere, by its stem."""
        self.calls = self._build(directory)
        self.control.write_bytes(b"")
        os.truncate(self.control, HEAD.size + LOG * ENTRY.size)
        with self.control.open("r+b") as file:
            self.page = mmap.mmap(file.fileno(), 0)

    def _build(self, directory: Path) -> list[str]:
        sources = sorted(path for path in NATIVE.glob("*.c") if path.name not in ("probe.c", "audit.c"))
        flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-w", "-U_FORTIFY_SOURCE", "-fno-stack-protector", "-fPIC"]
        flags.append(f"-I{sysconfig.get_path('include')}")
        objects = [directory / f"{path.stem}.o" for path in sources]
        compilers = [subprocess.Popen([CC, *flags, "-fvisibility=hidden", "-c", s, "-o", o]) for s, o in zip(sources, objects, strict=True)]
        assert [compiler.wait() for compiler in compilers] == [0] * len(sources)
        defined: set[str] = set()
        for path in objects:
            symbols = [line.split()[-2:] for line in _output("nm", path).splitlines()]
            self.uses[path.stem] = {name for kind, name in symbols if kind == "U"}
            defined |= {name for kind, name in symbols if kind != "U"}
        others = {name for name in set().union(*self.uses.values()) - defined - CANNOT_FAIL if "llvm" not in name}
        calls = sorted(name for name in others if not name.lstrip("_").startswith(("Py", "GLOBAL_OFFSET_TABLE")))
        renamed = directory / "renamed"
        renamed.write_text("".join(f"{name} faulty_{name}\n" for name in calls))
        for path in objects:
            subprocess.run(["objcopy", f"--redefine-syms={renamed}", path], check=True)
        table = "".join(f"#define CALL_{name} {number}\n" for number, name in enumerate(calls))
        shim = directory / "shim.c"
        shim.write_text(table + (HERE / "shim.c").read_text() + "".join(map(_wrapper, sorted(set(calls) - {"syscall"}))))
        flags += ["-fno-builtin", f'-DCONTROL="{self.control}"', f"-DPASSED={PASSED}"]
        launcher = [path for path in objects if path.stem not in IN_EXTENSION]
        subprocess.run([CC, *flags, "-DFIRST_ROLE=LAUNCHER", "-static", shim, *launcher, "-o", self.program], check=True)
        subprocess.run([CC, *flags, "-DFIRST_ROLE=TEMPLATE", "-shared", shim, *objects, "-o", self.extension], check=True)
        return calls

    @contextlib.contextmanager
    def templates(self) -> Iterator[None]:
        """Meanwhile they are started with our extension, and with the page."""
        from nsjail_py import launcher, warm

        here, order, submit = warm.HERE, warm.compile_order, launcher.submit
        shutil.copy(here / "warm_inside.py", self.extension.parent)
        page = os.open(self.control, os.O_RDWR | os.O_CLOEXEC)
        os.fchmod(page, 0o666)  # a template's user is another

        def with_page(
            plan: bytes, order: bytes, descriptors: list[int], stock: int, template: int = 0
        ) -> tuple[launcher.Launcher, socket.socket]:
            return submit(plan, order, [*descriptors, *([page] if template else [])], stock, template)

        warm.HERE, warm.compile_order = self.extension.parent, lambda *given: order(*given[:4], range(PASSED + 1))
        launcher.submit = with_page
        try:
            yield
        finally:
            warm.HERE, warm.compile_order, launcher.submit = here, order, submit
            os.close(page)

    def arm(self, point: Point | None, error: int = errno.ENOMEM) -> None:
        """From now on the log is empty, and this call fails."""
        if point is None:
            HEAD.pack_into(self.page, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        else:
            where = (ROLES.index(point.role), point.cell, self.calls.index(point.call), point.nth)
            HEAD.pack_into(self.page, 0, *where, point.sub, error, 0, 0, 0)

    @property
    def hit(self) -> int:
        """Where in the log the call failed, from 1 on; 0: it was not made."""
        return int(HEAD.unpack_from(self.page)[7])

    def log(self) -> list[Point]:
        seen: Counter[tuple[str, int, str, int]] = Counter()
        points = []
        for number in range(min(HEAD.unpack_from(self.page)[8], LOG)):
            role, cell, call, _, sub = ENTRY.unpack_from(self.page, HEAD.size + number * ENTRY.size)
            key = (ROLES[min(role, len(ROLES) - 1)], cell, self.calls[call], sub)
            seen[key] += 1
            points.append(Point(*key, seen[key]))
        return points

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            self.page.close()


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
