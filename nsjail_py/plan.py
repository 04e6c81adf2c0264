"""The plan: a policy compiled for this host, as one block of bytes; and the order, one run as another. The only writer of both
formats (native/plan.h); native/plan.c checks them, and native/launcher.c executes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ._native import ffi, lib
from .errors import PolicyError
from .label import NONE, Label

if TYPE_CHECKING:
    from .policy import Limits, Policy
    from .rootfs import MountStep

CLONE = {
    "time": 0x00000080,
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
GROUPS = {
    "memory": lib.GROUP_MEMORY,
    "pids": lib.GROUP_PIDS,
    "cpu": lib.GROUP_CPU,
    "quota": lib.GROUP_QUOTA,
    "cpuset": lib.GROUP_CPUSET,
    "unified": lib.GROUP_UNIFIED,
}
"""The launcher's control groups by their names in cgroups.py."""
PERIOD = 100_000
"""Microseconds over which a share of the processors is kept: the kernel's default."""
INSIDE_ID = 1000
MAX_DENIED = 100_000
MFD_NOEXEC_SEAL = 8
"""linux/memfd.h; Python has no name for it."""
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Block:
    """Bytes with a C structure at their start; strings and tables follow, and are referred to by their offsets."""

    def __init__(self, kind: str) -> None:
        self.head = ffi.new(f"{kind} *")
        self.size = ffi.sizeof(kind)
        self.parts: list[bytes] = []
        self.known: dict[bytes, int] = {}

    def put(self, data: bytes) -> int:
        offset: int = self.size
        padded = data + bytes(-len(data) % 8)
        self.parts.append(padded)
        self.size += len(padded)
        return offset

    def string(self, text: str | bytes) -> int:
        data = os.fsencode(text)
        if b"\0" in data:
            raise PolicyError(f"{text!r} has a NUL character in it, which no system call takes")
        if data not in self.known:
            self.known[data] = self.put(data + b"\0")
        return self.known[data]

    def strings(self, span: Any, texts: Sequence[str | bytes]) -> None:
        offsets = [self.string(text) for text in texts]
        span.offset, span.count = self.put(b"".join(offset.to_bytes(8, "little") for offset in [*offsets, 0])), len(offsets)

    def table(self, span: Any, kind: str, rows: Iterable[dict[str, int]]) -> None:
        filled = list(rows)
        array = ffi.new(f"{kind}[]", filled)
        span.offset, span.count = self.put(bytes(ffi.buffer(array))), len(filled)

    def finish(self) -> bytes:
        self.head.size = self.size
        self.head.version = lib.FORMAT_VERSION
        block = bytes(ffi.buffer(self.head)) + b"".join(self.parts)
        if len(block) > lib.MAX_BLOCK:
            raise PolicyError(f"arguments, environment and files together have {len(block)} bytes; at most {lib.MAX_BLOCK} can be passed")
        return block


class PathRule(NamedTuple):
    """What Landlock allows beneath a path inside."""

    path: str
    access: int
    optional: bool = False


class CgroupWrite(NamedTuple):
    group: int
    file: str
    value: str


class Parts(NamedTuple):
    """What the other modules decided, ready to be written down."""

    mounts: Sequence[MountStep]
    bpf: bytes
    late: Sequence[int]
    unknown_from: int
    landlock: tuple[int, int, int]
    paths: Sequence[PathRule]
    cgroup: Sequence[CgroupWrite]
    rlimits: dict[int, int]
    label: Label = NONE


def compile_plan(policy: Policy, parts: Parts) -> bytes:
    """The plan's bytes. Two equal policies on one host give equal bytes."""
    block = Block("struct plan")
    head, limits = block.head, policy.limits
    head.magic = lib.PLAN_MAGIC
    head.namespaces = sum(CLONE[name] for name in set(policy.namespaces))
    head.wall_ns, head.cpu_ns, head.idle_ns = (nanoseconds(t) for t in (limits.wall_time, limits.cpu_time, limits.idle_time))
    head.memory = limits.memory or 0
    head.max_denied = MAX_DENIED
    head.uid = head.gid = INSIDE_ID
    head.unknown_from = parts.unknown_from
    head.shared = shared(parts.mounts)
    head.hostname, head.directory = block.string(policy.hostname), block.string("/work")
    if parts.label.written:
        head.label, head.label_file, head.label_shown = map(block.string, parts.label)
    head.landlock_fs, head.landlock_net, head.landlock_scope = parts.landlock
    flags = {
        lib.PLAN_LOOPBACK: policy.loopback and "net" in policy.namespaces,
        lib.PLAN_KILL_DENIED: policy.syscalls is not None and policy.syscalls.on_denied == "kill",
        lib.PLAN_LANDLOCK: any(parts.landlock),
        lib.PLAN_FILTER: bool(parts.bpf),
        lib.PLAN_NESTED: policy.nested_userns,
        lib.PLAN_NESTED_OPTIONAL: "nested_userns" in policy.best_effort,
        lib.PLAN_CGROUP: bool(parts.cgroup),
    }
    head.flags = sum(flag for flag, wanted in flags.items() if wanted)
    block.table(head.mounts, "struct mount_step", (_mount(block, step) for step in parts.mounts))
    block.table(
        head.paths,
        "struct path_rule",
        ({"access": rule.access, "path": block.string(rule.path), "optional": rule.optional} for rule in parts.paths),
    )
    block.table(head.limits, "struct resource_limit", ({"resource": kind, "value": value} for kind, value in parts.rlimits.items()))
    block.table(
        head.cgroup,
        "struct cgroup_write",
        ({"group": w.group, "file": block.string(w.file), "value": block.string(w.value)} for w in parts.cgroup),
    )
    if parts.bpf:
        head.filter.offset, head.filter.count = block.put(parts.bpf), len(parts.bpf) // 8
        head.late.offset, head.late.count = block.put(b"".join(nr.to_bytes(4, "little") for nr in parts.late)), len(parts.late)
    return block.finish()


def as_template(block: bytes) -> bytes:
    """The same plan, for a template: it keeps the rights that it needs for its jobs, and is not watched for what they use."""
    changed = bytearray(block)
    head = ffi.from_buffer("struct plan *", changed)
    head.flags |= lib.PLAN_TEMPLATE
    head.memory = 0
    return bytes(changed)


def with_wall_time(block: bytes, seconds: float) -> bytes:
    """The same plan, ended after so many seconds."""
    changed = bytearray(block)
    ffi.from_buffer("struct plan *", changed).wall_ns = nanoseconds(seconds)
    return bytes(changed)


def as_observed(block: bytes) -> bytes:
    """The same plan, for a trusted sample (observe.py): what its filter does not allow is asked of the caller."""
    changed = bytearray(block)
    ffi.from_buffer("struct plan *", changed).flags |= lib.PLAN_OBSERVED
    return bytes(changed)


def with_slot(block: bytes, inside: str) -> tuple[bytes, int]:
    """The same plan, with room for the path of what is shown at `inside` instead; and where that is. The launcher alone writes it there."""
    changed = bytearray(block) + bytes(lib.SAVED_SLOT)
    head = ffi.from_buffer("struct plan *", changed)
    head.size = len(changed)
    wanted, first = os.fsencode(inside) + b"\0", ffi.cast("char *", head) + head.mounts.offset
    for step in ffi.cast("struct mount_step *", first)[0 : head.mounts.count]:
        if step.kind == lib.MOUNT_BIND and changed.startswith(wanted, step.target):
            step.source = len(block)
    return bytes(changed), len(block)


OWN = frozenset((lib.MOUNT_SCRATCH, lib.MOUNT_PART, lib.MOUNT_PROC, lib.MOUNT_DEVPTS, lib.MOUNT_MASK, lib.MOUNT_READONLY))


def shared(mounts: Sequence[MountStep]) -> int:
    """How many steps, from the first on, make the same root in every cell. 0: something of the host's is shown that may be another
    file by the next run, so each run has to look anew."""
    if any(step.kind == lib.MOUNT_BIND and not step.lasting for step in mounts):
        return 0
    return next((number for number, step in enumerate(mounts) if step.kind in OWN), len(mounts))


def _mount(block: Block, step: MountStep) -> dict[str, int]:
    return {
        "kind": step.kind,
        "flags": step.flags,
        "source": block.string(step.source) if step.source else 0,
        "target": block.string(step.target),
        "mode": step.mode,
        "size": step.size,
        "inodes": step.inodes,
    }


class OrderFile(NamedTuple):
    """A file that the run finds in /app."""

    name: str
    data: bytes
    mode: int = 0o444


ORDER_SIZE, FILE_SIZE = ffi.sizeof("struct order"), ffi.sizeof("struct order_file")
"""Of native/plan.h. An order is written for each run: without the detours that a plan may take."""


def compile_order(
    program: str,
    argv: Sequence[str],
    environment: dict[str, str],
    files: Sequence[OrderFile] = (),
    descriptors: Sequence[int] = (0, 1, 2),
) -> bytes:
    """One run, as bytes. descriptors: the number inside of each descriptor that is sent along, in order."""
    texts = [program, *argv, *map("=".join, environment.items()), *[file.name for file in files]]
    strings = os.fsencode("\0".join(texts))
    sizes = list(map(len, strings.split(b"\0")))
    if len(sizes) != len(texts):
        raise PolicyError(f"{next(text for text in texts if chr(0) in text)!r} has a NUL character in it, which no system call takes")
    argv_at, environment_at = ORDER_SIZE, ORDER_SIZE + 8 * (len(argv) + 1)
    files_at = environment_at + 8 * (len(environment) + 1)
    descriptors_at = files_at + FILE_SIZE * len(files)
    first = descriptors_at + 4 * len(descriptors)
    offsets = []
    size = first
    for length in sizes:
        offsets.append(size)
        size += length + 1
    argv_end, environment_end = 1 + len(argv), 1 + len(argv) + len(environment)
    shown = []
    for name, file in zip(offsets[environment_end:], files, strict=True):
        shown += [name, file.mode, size, len(file.data)]
        size += len(file.data)
    if size > lib.MAX_BLOCK:
        raise PolicyError(f"arguments, environment and files together have {size} bytes; at most {lib.MAX_BLOCK} can be passed")
    fixed = struct.pack(
        f"=14I{len(argv) + len(environment) + 2}Q{len(shown) + len(descriptors)}I",
        *(lib.ORDER_MAGIC, lib.FORMAT_VERSION, size, 0, first, 0),
        *(argv_at, len(argv), environment_at, len(environment)),
        *(files_at, len(files), descriptors_at, len(descriptors)),
        *(*offsets[1:argv_end], 0, *offsets[argv_end:environment_end], 0),
        *(*shown, *descriptors),
    )
    return b"".join((fixed, strings, b"\0", *[file.data for file in files]))


class Sealed:
    """A memfd that holds data and that nobody can change any more; closed with the object. memfd_create(2), F_ADD_SEALS in fcntl(2)"""

    def __init__(self, name: str, data: bytes) -> None:
        self.fd = sealed(name, data)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def memory_file(name: str) -> int:
    """A memfd that can be sealed, and that is no program; from Linux 6.3 on nobody can make it one. memfd_create(2)"""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    descriptor = os.memfd_create(name, flags)
    os.fchmod(descriptor, 0o600)
    return descriptor


def sealed(name: str, data: bytes) -> int:
    descriptor = memory_file(name)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def nanoseconds(seconds: float | None) -> int:
    """0 stands for no limit, so the shortest limit is 1."""
    return 0 if seconds is None else max(1, round(seconds * 1e9))


def rlimits(limits: Limits, have_cgroup: bool) -> dict[int, int]:
    """The limits of each process. Where a cgroup counts, these only stand behind it."""
    values: dict[int, int | None] = {
        resource.RLIMIT_CORE: 1,  # no file; at 0 a program that the host has for core dumps would start, as root. core(5), fs/coredump.c
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_FSIZE: limits.file_size,
        resource.RLIMIT_STACK: limits.stack,
        resource.RLIMIT_CPU: None if limits.cpu_time is None else int(limits.cpu_time) + 2,
        resource.RLIMIT_MEMLOCK: 64 * 1024,
        resource.RLIMIT_MSGQUEUE: 64 * 1024,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_SIGPENDING: 256,
        resource.RLIMIT_DATA: None if have_cgroup else limits.memory,
        resource.RLIMIT_NPROC: None if have_cgroup or limits.processes is None else limits.processes + 1,
    }
    return {kind: value for kind, value in values.items() if value is not None}
