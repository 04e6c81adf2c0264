"""A trusted sample under observation: each system call beyond the bare minimum is told to us, noted, and let go on. seccomp_unotify(2)

The filter protects from nothing here, so the rest does: own namespaces, the host's files read-only, an own user, limits; and the calls that
no shipped policy allows are refused all the same. The sample's memory is read for path names. It could change them meanwhile, which
deceives nobody but its owner: nothing is decided by them. Forks and threads are under the same filter, and ask the same way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import stat
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from . import interpreter, syscalls
from .errors import SetupError
from .jail import PIPE, Jail, Process
from .plan import as_observed
from .policy import Limits, Mount, Policy, Python, Syscalls
from .policyfile import override
from .prepared import prepared
from .reports import parse
from .result import Result

NOTIFICATION = struct.Struct("=QIIiIQ6Q")
ANSWER = struct.Struct("=QqiI")
RECEIVE, SEND, STILL_WAITS = 0xC0502100, 0xC0182101, 0x40082102
"""SECCOMP_IOCTL_NOTIF_RECV, _SEND, _ID_VALID"""
GO_ON = 1
"""SECCOMP_USER_NOTIF_FLAG_CONTINUE"""
AT_FDCWD = -100
START, SCRIPT = "the interpreter's start", "the script"
"""Phases of a run."""
LONGEST_PATH = 4096
MOST_VALUES = 64
"""Combinations of arguments that are kept of one call."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
PACKAGES = "/.packages-{}"
"""Where the directories of installed distributions are shown to the sample: all of them, wherever they lie."""

LOOKING = ("stat", "lstat", "access", "readlink", "newfstatat", "statx", "faccessat", "faccessat2", "readlinkat")
PATHS: dict[str, tuple[tuple[int | None, int], ...]] = {
    **dict.fromkeys(("open", "creat", "execve", "chdir", "mkdir", "rmdir", "unlink", "truncate", "chmod", "chown", "mknod"), ((None, 0),)),
    **dict.fromkeys(("openat", "execveat", "mkdirat", "unlinkat", "fchmodat", "fchownat", "mknodat", "utimensat"), ((0, 1),)),
    **{name: ((None, 0),) if name in LOOKING[:4] else ((0, 1),) for name in LOOKING},
    "rename": ((None, 0), (None, 1)),
    **dict.fromkeys(("renameat", "renameat2"), ((0, 1), (2, 3))),
    "link": ((None, 0), (None, 1)),
    "symlink": ((None, 1),),
    "symlinkat": ((1, 2),),
}
"""For each call with a path that matters: the arguments that hold the directory's descriptor, or none, and the path."""
OPENING = {"open": 1, "openat": 2}
"""The argument with the flags."""
EXECUTING = ("execve", "execveat")
ADDRESSES = ("bind", "connect")
FAMILIES = {socket.AF_UNIX: "unix", socket.AF_INET: "inet", socket.AF_INET6: "inet6"}


class Struct(msgspec.Struct, forbid_unknown_fields=True):
    """A record that JSON can hold, so that several runs can be put together."""


class Call(Struct):
    """One system call, as the sample made it."""

    count: int = 0
    phase: str = ""
    """Where it was first made: START, SCRIPT, or the program that a child executed."""
    after: str = ""
    """The file that was opened last before it was first made."""
    first: str = ""
    """What it was first about: a path, an address."""
    values: list[list[tuple[int, int, int]]] = []
    """Argument, mask, value: every combination, as far as a policy may look at it."""
    refused: bool = False
    """It was not let go on: no shipped policy has it."""


class File(Struct):
    """One path that the sample named."""

    uses: set[str] = set()
    """`read`, `write`, `list`, `execute`, `look`."""
    phase: str = ""


@prepared
class Observation(Struct):
    """What one or more runs needed."""

    samples: list[str] = []
    python: str | None = None
    """The interpreter, where it was a Python script."""
    calls: dict[str, Call] = {}
    files: dict[str, File] = {}
    addresses: set[str] = set()
    """`inet 127.0.0.1:80`, `unix /work/socket`."""
    project: str | None = None
    mounts: list[Mount] = []
    """What it was shown by name."""
    env: dict[str, str] = {}
    env_pass: list[str] = []
    """Variables that it was given."""
    outcome: list[str] = []
    """How each run ended."""
    memory: int = 0
    """Bytes; 0 where no control group counted them: what limits memory there counts otherwise."""
    cpu_time: float = 0.0
    wall_time: float = 0.0
    processes: int = 0


def policy(python: str | None, changes: dict[str, Any]) -> Policy:
    """What a sample runs under: with all installed distributions, unless some are listed."""
    found = interpreter.inspect(python)
    shown = found.search if "imports" not in changes else ()
    packages = [Mount(source=place, target=PACKAGES.format(number)) for number, place in enumerate(shown) if os.path.isdir(place)]
    basis = Policy(
        name="observation",
        root="host",
        loopback=True,
        exec_in_writable=True,
        landlock=False,
        syscalls=Syscalls(allow=(), exec=False),
        mounts=tuple(packages),
        env={"PYTHONPATH": ":".join(["/project", *(mount.target for mount in packages)])},
        limits=Limits(wall_time=600.0, cpu_time=600.0, memory=4 * 1024**3, processes=512, open_files=1024, disk=1024**3),
        python=Python(interpreter=python),
        best_effort=("own_uid", "groups", "cgroup", "swap", "landlock_net", "landlock_scope", "nested_userns"),
    )
    return override(basis, **changes)


def observe(
    source: bytes, args: Sequence[str] = (), *, name: str = "main.py", python: str | None = None, input: bytes | None = None, **changes: Any
) -> tuple[Observation, Result]:
    """Runs a Python script that is trusted, and tells what it needed. changes: as for Jail. Raises SetupError where the sample's memory
    cannot be read."""
    jail = ObservingJail(policy(python, changes), stock=0)
    stdin = PIPE if input is not None else None
    process = jail.start_python(source, args=args, filename=name, stdin=stdin, stdout=PIPE, stderr=PIPE)
    watch = Watch(process, f"/app/{name}")
    with process:
        result = watch.run(input)
    seen = watch.seen
    places = {PACKAGES.format(number): place for number, place in enumerate(interpreter.inspect(python).search)}
    seen.files = {_on_host(path, places): file for path, file in seen.files.items()}
    seen.samples, seen.python, seen.project = [name], python or sys.executable, jail.policy.python.project
    seen.mounts = [mount for mount in jail.policy.mounts if not mount.target.startswith(PACKAGES.format(""))]
    seen.env, seen.env_pass = dict(changes.get("env", {})), list(jail.policy.env_pass)
    seen.outcome = [result.summary]
    seen.memory = result.peak_memory if result.memory_source.startswith("cgroup") else 0
    seen.cpu_time, seen.wall_time = result.cpu_time, result.wall_time
    seen.processes = result.peak_processes or 0
    return seen, result


def _on_host(path: str, places: dict[str, str]) -> str:
    """A path below one of the directories of packages, as the host has it."""
    top, _, rest = path[1:].partition("/")
    return os.path.join(places[f"/{top}"], rest).rstrip("/") if f"/{top}" in places else path


class ObservingJail(Jail):
    """A jail whose plans are marked as observed. Nothing else marks them."""

    def _start(self, compiled: Any, *rest: Any, **more: Any) -> Process:
        return super()._start(compiled._replace(plan=as_observed(compiled.plan)), *rest, **more)


class Watch:
    """The other end of the filter of one run."""

    def __init__(self, process: Process, script: str) -> None:
        self.process, self.script = process, script
        self.seen = Observation()
        self.conditions = syscalls.looked_at()
        self.refused = frozenset(syscalls.never())
        self.scripted: set[int] = set()
        self.programs: dict[int, str] = {}
        self.last: dict[int, str] = {}
        self.error: OSError | None = None
        message, descriptors, _, _ = socket.recv_fds(process.channel, 1 << 16, 1)
        self.listener = descriptors[0] if descriptors else -1
        if not message:
            process.hear()  # the launcher is gone
        elif not descriptors:
            process.reported = parse(message)  # it never came as far as the filter

    def run(self, input: bytes | None) -> Result:
        """Until the sample has ended."""
        over, ended = os.pipe2(os.O_CLOEXEC)
        thread = threading.Thread(target=self._answer_all, args=(over,), name="observe")
        thread.start()
        try:
            return self.process.communicate(input)
        finally:
            os.close(ended)
            thread.join()
            os.close(over)
            if self.listener >= 0:
                os.close(self.listener)
            if self.error:
                advice = "observe as root, or with kernel.yama.ptrace_scope at most 1"
                raise SetupError("observation", self.error.errno or 0, "the memory of the sample", advice)

    def _answer_all(self, over: int) -> None:
        poll = select.poll()
        poll.register(over)
        if self.listener >= 0:
            poll.register(self.listener, select.POLLIN)
        while over not in (ready := dict(poll.poll())):
            if ready[self.listener] & select.POLLIN:
                self._answer()
            else:
                poll.unregister(self.listener)  # nobody is left under the filter

    def _answer(self) -> None:
        block = bytearray(NOTIFICATION.size)
        try:
            fcntl.ioctl(self.listener, RECEIVE, block)
        except OSError:
            return  # it died in between
        number, pid, _, nr, _, _, *args = NOTIFICATION.unpack(block)
        name = syscalls.name_of(nr)
        allowed = name not in self.refused and not name.startswith("syscall ")
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            try:
                self._note(name, pid, args, allowed)
            except PermissionError as error:
                self.error = error
                self.process.kill()
        answer = ANSWER.pack(number, 0, 0, GO_ON) if allowed else ANSWER.pack(number, 0, -errno.EPERM, 0)
        with contextlib.suppress(OSError):  # a signal took the call back
            fcntl.ioctl(self.listener, SEND, answer)

    def _note(self, name: str, pid: int, args: list[int], allowed: bool) -> None:
        paths = [path for where in PATHS.get(name, ()) if (path := self._path(name, pid, where, args))]
        about = paths[0] if paths else self._address(pid, args) if name in ADDRESSES else ""
        call = self.seen.calls.setdefault(name, Call(refused=not allowed))
        if not call.count:
            call.phase, call.after, call.first = self._phase(pid), self.last.get(pid, ""), about
        call.count += 1
        if name in self.conditions and len(call.values) < MOST_VALUES:
            values = [
                (
                    argument,
                    mask,
                    args[argument] & mask if mask <= syscalls.INT else min(args[argument], 1),
                )  # of a pointer: whether it is one
                for argument, mask in self.conditions[name]
            ]
            if values not in call.values:
                call.values.append(values)
        if name in ADDRESSES and about:
            self.seen.addresses.add(about)
        use = self._use(name, args)
        for path in paths if use else ():
            file = self.seen.files.setdefault(path, File(phase=self._phase(pid)))
            file.uses.add(use)
        if use == "execute" and paths:
            self.programs[_leader(pid)] = paths[0]
        if paths and name in OPENING:
            self.last[pid] = paths[0]
            if paths[0] == self.script:
                self.scripted.add(_leader(pid))

    def _phase(self, pid: int) -> str:
        leader = _leader(pid)
        if leader in self.programs:
            return self.programs[leader]
        return SCRIPT if self.scripted else START

    @staticmethod
    def _use(name: str, args: list[int]) -> str:
        if name in EXECUTING:
            return "execute"
        if name in LOOKING:
            return "look"
        if name not in OPENING:
            return "" if name == "chdir" else "write"
        flags = args[OPENING[name]]
        return "write" if flags & WRITING else "list" if flags & os.O_DIRECTORY else "read"

    def _path(self, name: str, pid: int, where: tuple[int | None, int], args: list[int]) -> str:
        """The absolute path that a call names, as it is inside."""
        directory, argument = where
        text = os.fsdecode(_memory(pid, args[argument], LONGEST_PATH).partition(b"\0")[0])
        if text.startswith("/"):
            return os.path.normpath(text)
        if not text and name in LOOKING:
            return ""  # fstat(2): it was opened before
        descriptor = AT_FDCWD if directory is None else _signed(args[directory])
        base = os.readlink(f"/proc/{pid}/cwd" if descriptor == AT_FDCWD else f"/proc/{pid}/fd/{descriptor}")
        return os.path.normpath(os.path.join(base, text))

    def _address(self, pid: int, args: list[int]) -> str:
        data = _memory(pid, args[1], min(args[2] & 0xFF, 128))
        family = int.from_bytes(data[:2], "little")
        if family == socket.AF_UNIX:
            return f"unix {os.fsdecode(data[2:].lstrip(bytes(1)).partition(bytes(1))[0])}"
        if family == socket.AF_INET and len(data) >= 8:
            return f"inet {socket.inet_ntop(socket.AF_INET, data[4:8])}:{int.from_bytes(data[2:4], 'big')}"
        if family == socket.AF_INET6 and len(data) >= 24:
            return f"inet6 [{socket.inet_ntop(socket.AF_INET6, data[8:24])}]:{int.from_bytes(data[2:4], 'big')}"
        return ""


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _memory(pid: int, address: int, most: int) -> bytes:
    """Bytes of a process's memory; fewer where the page behind is not there."""
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError, OverflowError):
            first = os.pread(descriptor, min(most, 4096 - address % 4096), address)
            if len(first) == most or b"\0" in first:
                return first
            with contextlib.suppress(OSError):
                first += os.pread(descriptor, most - len(first), address + len(first))
            return first
        return b""
    finally:
        os.close(descriptor)


def _leader(pid: int) -> int:
    """The process that a thread belongs to."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Tgid:"))


def merge(observations: Sequence[Observation]) -> Observation:
    """Several runs as one: all that any of them needed."""
    merged = Observation()
    for one in observations:
        merged.samples += [name for name in one.samples if name not in merged.samples]
        merged.python = merged.python or one.python
        merged.project = merged.project or one.project
        merged.mounts += [mount for mount in one.mounts if mount not in merged.mounts]
        merged.env |= one.env
        merged.env_pass += [name for name in one.env_pass if name not in merged.env_pass]
        merged.outcome += one.outcome
        merged.addresses |= one.addresses
        for name, call in one.calls.items():
            known = merged.calls.setdefault(name, msgspec.structs.replace(call, count=0, values=[]))
            known.count += call.count
            known.refused |= call.refused
            known.values += [values for values in call.values if values not in known.values]
        for path, file in one.files.items():
            merged.files.setdefault(path, File(phase=file.phase)).uses |= file.uses
        for field in ("memory", "cpu_time", "wall_time", "processes"):
            setattr(merged, field, max(getattr(merged, field), getattr(one, field)))
    return merged


def readable(path: str, own_uid: bool) -> bool:
    """Whether a file of the host could be read inside."""
    with contextlib.suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
        return stat.S_ISREG(mode) and (bool(mode & stat.S_IROTH) if own_uid else os.access(path, os.R_OK))
    return False


def load(data: bytes) -> Observation:
    """What an earlier run has written. Raises msgspec.DecodeError."""
    try:
        return msgspec.convert(json.loads(data), Observation)
    except (ValueError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None


def dump(seen: Observation) -> bytes:
    """JSON. msgspec neither writes nor reads a name that is not UTF-8."""
    return json.dumps(msgspec.to_builtins(seen, order="sorted")).encode()
