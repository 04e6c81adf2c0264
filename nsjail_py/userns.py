"""User namespaces: whether this process may make one, and if not, who forbids it. user_namespaces(7)"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import apparmor, mountinfo
from ._native import lib
from .hostinfo import Host, Lack, error_text, read

SYSCTL = Path("/proc/sys")
NAMESPACES = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
"""CLONE_NEW* of each kind, as clone(2) numbers them."""


class Blocker(NamedTuple):
    """One of those who forbid user namespaces: the errno it answers with, how it is recognised, and how it is told to let us."""

    errors: tuple[int, ...]
    present: Callable[[Host], bool]
    reason: str
    remedy: str


def _sysctl(name: str) -> str:
    return read(SYSCTL / name.replace(".", "/"))


def chrooted() -> bool:
    """In a chroot the root directory is not where a mount begins; the kernel then makes no user namespace at all."""
    return not any(mount.target == "/" for mount in mountinfo.entries())


def _set_around() -> bool:
    """Whether the limit is one of a user namespace around us, in which we may not change it; the host's own is another. The first user
    namespace has a number that no other gets: PROC_USER_INIT_INO in the kernel."""
    return os.stat("/proc/self/ns/user").st_ino != 0xEFFFFFFD and not os.access(SYSCTL / "user/max_user_namespaces", os.W_OK)


BLOCKERS = (
    Blocker(
        (errno.ENOSPC, errno.EUSERS),
        lambda host: _sysctl("user.max_user_namespaces") == "0" and _set_around(),
        "user.max_user_namespaces is 0, as inside of a jail of nsjail_py",
        "make jails beside that one, and not inside of it; or nested_userns = true in its policy",
    ),
    Blocker(
        (errno.ENOSPC, errno.EUSERS),
        lambda host: _sysctl("user.max_user_namespaces") == "0",
        "user.max_user_namespaces is 0",
        "sysctl -w user.max_user_namespaces=15000",
    ),
    Blocker(
        (errno.ENOSPC, errno.EUSERS),
        lambda host: True,
        "the limit of namespaces is reached, or they are nested too deep",
        "sysctl -w user.max_user_namespaces=15000, or end other jails and containers",
    ),
    Blocker(
        (errno.EPERM,),
        lambda host: chrooted(),
        "this process is in a chroot, where the kernel makes none",
        "enter the directory with pivot_root, as systemd-nspawn, bwrap and containers do; unshare --root is a chroot, too",
    ),
    Blocker(
        (errno.EPERM,),
        lambda host: host.euid != 0 and _sysctl("kernel.unprivileged_userns_clone") == "0",
        "kernel.unprivileged_userns_clone is 0: only root may",
        "sysctl -w kernel.unprivileged_userns_clone=1",
    ),
    Blocker(
        (errno.EPERM, errno.EACCES),
        lambda host: _sysctl("kernel.apparmor_restrict_unprivileged_userns") == "1",
        "AppArmor restricts them: kernel.apparmor_restrict_unprivileged_userns is 1",
        f"{apparmor.INSTALL}; or sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    Blocker(
        (errno.EPERM, errno.EACCES),
        lambda host: _confined() != "",
        "an AppArmor or SELinux profile confines this process",
        "give the profile the rule `userns,` (AppArmor) or the class user_namespace (SELinux), or start the program without it",
    ),
    Blocker(
        (errno.EPERM, errno.ENOSYS, lib.PROBE_KILLED),
        lambda host: host.filtered,
        "a system call filter is on this process, as in a container or a systemd unit",
        "docker run --security-opt seccomp=unconfined, or a profile that allows clone, clone3 and unshare with CLONE_NEWUSER; "
        "in a systemd unit RestrictNamespaces=no, and SystemCallFilter= as `nsjail-py systemd unit` has it",
    ),
    Blocker((errno.EINVAL,), lambda host: True, "the kernel was built without them", "a kernel with CONFIG_USER_NS=y"),
)
"""In the order in which they are asked; the first that fits is named."""


def _confined() -> str:
    """The security label of this process, where it is one that restricts."""
    label = read(Path("/proc/self/attr/current")).rstrip("\0")
    return "" if label.startswith("unconfined") or ":unconfined_t:" in label or not label else label


def refusal(host: Host) -> Lack | None:
    """What keeps a jail from its namespaces; None when they can be had. Tries it for real, in a child."""
    if error := lib.probe_userns(0):
        return _blame("user namespace", error, host)
    if error := lib.probe_userns(NAMESPACES["mount"]):
        # The namespace is there, its owner's rights are not: the second face of AppArmor's restriction.
        return _blame("rights in a user namespace", error, host)
    refused = {kind: error for kind, flag in NAMESPACES.items() if (error := lib.probe_userns(flag))}
    if refused:
        reasons = ", ".join(f"{kind} ({error_text(error)})" for kind, error in refused.items())
        return Lack("namespaces", f"refused: {reasons}", "a kernel with CONFIG_NAMESPACES whole, and user.max_*_namespaces above 0")
    return None


def _blame(name: str, error: int, host: Host) -> Lack:
    for blocker in BLOCKERS:
        if error in blocker.errors and blocker.present(host):
            return Lack(name, f"{error_text(error)}: {blocker.reason}", blocker.remedy)
    return Lack(
        name,
        f"{error_text(error)}, and nothing that this program knows is the cause",
        "see the kernel's log (dmesg) and user_namespaces(7)",
    )
