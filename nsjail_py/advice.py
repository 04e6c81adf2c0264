"""What to do about a step that failed, by step and errno. One row each; an empty text where only the errno tells."""

from __future__ import annotations

import errno

E = errno
ANY = 0
APPARMOR = "kernel.apparmor_restrict_unprivileged_userns"

INSIDE = "inside of a jail of ours: nested_userns = true in its policy"
ROWS: dict[tuple[str, int], str] = {
    ("request", ANY): "the launcher has not answered: raise the limit of open files (ulimit -Hn), or run fewer jails at a time",
    ("uid pool", ANY): "too many runs at one time: wait for some to end",
    ("cgroup", E.ENODEV): "this host gives us no control group: see `nsjail-py doctor`",
    ("cgroup", E.ENOSPC): "the control group's cpuset is empty, or the limit of groups is reached",
    ("clone", E.EPERM): "user namespaces are refused to this user: see `nsjail-py doctor`",
    ("clone", E.EACCES): f"AppArmor refuses user namespaces: sysctl -w {APPARMOR}=0, or load a profile that allows them",
    ("clone", E.ENOSPC): f"the limit of namespaces is reached: raise user.max_user_namespaces and its siblings; {INSIDE}",
    ("clone", E.EAGAIN): "no more processes: raise the limit of processes of this user or group",
    ("clone", E.ENOSYS): "clone3 is missing: Linux 5.3 or later, and a filter that lets it pass (systemd unit: RestrictNamespaces=no)",
    ("namespaces", E.EINVAL): "the kernel lacks a kind of namespace: see `nsjail-py doctor`",
    ("namespaces", E.EPERM): "no right to make namespaces: root without CAP_SYS_ADMIN, or a filter (systemd unit: RestrictNamespaces=no)",
    ("namespaces", E.ENOSPC): "the limit of namespaces is reached: raise user.max_net_namespaces and its siblings",
    (
        "cgroup namespace",
        E.ENOSPC,
    ): "the limit is reached, which is 0 inside of an ordinary user's jail: leave cgroup out of the policy's namespaces,"
    " or raise user.max_cgroup_namespaces",
    ("shared root", ANY): "a mount namespace cannot be entered again (no CAP_SYS_CHROOT, or a container's filter refuses setns)",
    ("personality", E.EPERM): "it is locked to another (systemd unit: leave Personality= out), or a filter refuses personality()",
    ("priority", E.EPERM): "a filter refuses to lower what the caller has: priority, real-time scheduling, OOMScoreAdjust= or I/O class",
    ("user namespace", E.EPERM): f"user namespaces are restricted here (Ubuntu: {APPARMOR}): see `nsjail-py doctor`",
    ("user namespace", E.ENOSPC): f"none may be made here: sysctl -w user.max_user_namespaces=15000; {INSIDE}",
    ("id map", E.EPERM): f"root needs CAP_SETUID and CAP_SETGID; from a user AppArmor may withhold every right (Ubuntu: {APPARMOR})",
    ("mount private", E.EINVAL): "the root directory is no mount point, as in a chroot: enter it with pivot_root, as containers do",
    ("mount private", E.ENOSYS): "mount_setattr is missing: Linux 5.12 or later",
    (
        "mount private",
        E.EPERM,
    ): "no right to mount: AppArmor or a filter refuses it (systemd unit: SystemCallFilter= as `nsjail-py systemd unit` has it)",
    ("mount source", E.ENOENT): "the source does not exist on the host",
    ("mount target", E.EROFS): "the target lies in a read-only tree and is not there: choose one outside of it",
    (
        "mount bind",
        E.ENOENT,
    ): "the target is not there, and cannot be made in what the jail shows of the host or an image: make it there, or choose another",
    ("mount bind", E.ENOTDIR): "source and target must both be files or both be directories",
    ("mount idmap", E.EPERM): "a writable directory must not belong to root: chown it to the user who is to own the files",
    ("mount idmap", E.EINVAL): "this file system cannot be mounted with other ids: use ext4, xfs, btrfs, or tmpfs on Linux 6.3 or later",
    (
        "mount proc",
        E.EPERM,
    ): 'parts of the host\'s /proc are covered (container; ProtectKernelLogs=; a jail with proc = "masked", where "pid"'
    ' would do): uncover it, or set proc = "none"',
    ("hostname", E.EPERM): "a filter refuses sethostname (systemd unit: ProtectHostname=no); or leave uts out of the policy's namespaces",
    ("nested userns", ANY): 'make /proc/sys writable; or nested_userns = false, and "nested_userns" under best_effort',
    ("landlock", E.ENOSYS): "Landlock is missing: Linux 5.13 or later",
    ("landlock", E.EOPNOTSUPP): "Landlock is switched off: add landlock to the kernel's lsm= list",
    ("seccomp", E.EBUSY): "another program listens to this process's filter already (a container manager): it cannot be nested",
    ("seccomp", E.EACCES): "no_new_privs was not set",
    ("descriptors", E.EINVAL): "the hard limit of open files is too low: jails need numbers above 1000 (ulimit -Hn)",
    ("label", E.ENOENT): "no AppArmor profile of this name is loaded: apparmor_parser -r FILE as root",
    ("label", E.EACCES): "the profile or domain of this process may not change to that one by this program"
    " (SELinux: setexec, transition, nosuid_transition, and the program's type as entrypoint): see the kernel's log."
    " Or the jail shows the program where nothing may be executed",
    ("label", E.EINVAL): "SELinux knows no such context: seinfo -t lists types, and their role must be allowed to have them",
    ("label", E.EPERM): "the program came to run without it, or SELinux wants process2 nnp_transition for it: see the kernel's log",
    (
        "label",
        E.EOPNOTSUPP,
    ): "the profile is in complain mode, unconfined, or stacked on one that is, and would refuse nothing: aa-enforce it",
    ("app files", E.ENOSPC): "the script is larger than the disk limit",
    ("work directory", E.EACCES): "the work directory cannot be entered by the jail's user",
    ("template", E.EAGAIN): "more runs at one time than the warm interpreter can be told of: ask for fewer",
    ("template", ANY): "the warm interpreter ended: the next run starts another",
    ("setup time", ANY): "making the jail took more than 30 s: a source on a file system that hangs?",
    ("lost", E.EPERM): "a system call filter killed it (systemd unit: SystemCallFilter= as `nsjail-py systemd unit` has it)",
    ("lost", E.EFBIG): "the script is larger than a file may be: raise the hard limit of the size of files (ulimit -Hf)",
    ("lost", ANY): "the jail's init was killed from outside, perhaps for lack of memory on the host",
}


SCARCE: dict[int, str] = {
    E.EMFILE: "raise the limit of open files (ulimit -n), or close some",
    E.ENFILE: "raise the limit of open files of the whole host (fs.file-max)",
    E.ETOOMANYREFS: "raise the limit of open files (ulimit -n): it also holds for those on their way",
    E.ENOMEM: "free memory, or raise the limit of address space (ulimit -v)",
    E.ENOBUFS: "free memory",
    E.EAGAIN: "raise the limit of processes (ulimit -u, or the control group's pids.max)",
    E.ENOSPC: "make room on the disk",
    E.EFBIG: "raise the limit of the size of files (ulimit -f)",
    E.EDQUOT: "make room within the quota of this user",
}
"""Whatever the step: the system has run out of something."""


def advice(step: str, error: int) -> str:
    """The remedy for this step and errno; empty when there is none to give."""
    return ROWS.get((step, error)) or ROWS.get((step, ANY)) or SCARCE.get(error, "")
