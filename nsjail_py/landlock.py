"""Landlock's share of a policy: the file system view once more, as rules (kernel document userspace-api/landlock)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ._native import lib
from .plan import PathRule

if TYPE_CHECKING:
    from .policy import Policy
    from .rootfs import MountStep, Sources

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_BLOCK = 1 << 6, 1 << 11
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""A rule for what is no directory may have these rights and no other."""

FS_BITS = {0: 0, 1: 13, 2: 14, 3: 15, 4: 15}
"""How many file system rights each ABI knows; from 5 on it is 16."""
NET_ABI, SCOPE_ABI = 4, 6
BIND_AND_CONNECT_TCP = 0b11
ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/ptmx", "/dev/pts")


NO_PROGRAMS = lib.MOUNT_NOEXEC | lib.MOUNT_WRITABLE


class Decision(NamedTuple):
    masks: tuple[int, int, int]
    paths: list[PathRule]


def decide(policy: Policy, abi: int, executables: list[str], mounts: Sequence[MountStep], shown: Sources) -> Decision:
    """The rights that are handled, and the paths that have them. executables: what may still be executed where exec is refused."""
    everything = (1 << FS_BITS.get(abi, 16)) - 1
    may_exec = policy.syscalls is None or policy.syscalls.exec
    written = everything & ~(MAKE_CHAR | MAKE_BLOCK) & ~(0 if policy.exec_in_writable else EXECUTE)
    rules = [PathRule("/", READ_FILE | READ_DIR)]
    if may_exec:  # not on "/": rules only add, and what can be written lies below it
        rules += [PathRule(step.target, EXECUTE) for step in mounts if step.kind == lib.MOUNT_BIND and not step.flags & NO_PROGRAMS]
    rules += [PathRule(path, EXECUTE | READ_FILE, optional=True) for path in executables]
    rules += [PathRule(path, written) for path in ("/work", "/tmp", "/dev/shm")]
    rules += [PathRule(path, (READ_FILE | WRITE_FILE | TRUNCATE) & everything, optional=True) for path in WRITABLE_DEVICES]
    for mount, source in zip(policy.mounts, shown.mounts, strict=True):
        if mount.writable:
            rules.append(PathRule(mount.target, written if source.is_directory else written & OF_FILES))
    masks = (everything, BIND_AND_CONNECT_TCP if abi >= NET_ABI else 0, ABSTRACT_SOCKETS_AND_SIGNALS if abi >= SCOPE_ABI else 0)
    return Decision(masks, rules)
