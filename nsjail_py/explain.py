"""A policy in sentences, for people: what it allows, limits and hides, and what it does not stop. Generated from the policy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .units import format_size, format_time

if TYPE_CHECKING:
    from .policy import Policy

ROOTS = {
    "minimal": "It sees only the program, its libraries and, for Python, the standard library and the listed distributions; no shell.",
    "system": "It sees the host's /usr, read-only, and an /etc of a few harmless files.",
    "host": "It sees every directory of the host, read-only, as far as permissions let it.",
}
LIMITS: dict[str, tuple[str, Callable[..., str]]] = {
    "wall_time": ("It is ended {} after it began.", format_time),
    "cpu_time": ("It may use {} of processor time, all its processes together.", format_time),
    "idle_time": ("It may go on for {} without using the processor.", format_time),
    "cpus": ("Its processes together may keep {} processors busy; beyond that they wait.", "{:g}".format),
    "cpuset": ("It runs on the processors {} only.", str),
    "io": ("Its processes together may read {} a second from each disk, and write as much; beyond that they wait.", format_size),
    "memory": ("It may use {} of memory; files that it writes count.", format_size),
    "processes": ("It may have {} processes and threads at one time.", str),
    "open_files": ("Each process may have {} files open.", str),
    "file_size": ("A file that it writes may have {}.", format_size),
    "disk": ("It may write {} into /work, /tmp and /dev/shm together.", format_size),
    "files": ("It may make {} files and directories.", str),
    "output": ("It may write {} to its output, when the caller reads it.", format_size),
    "stack": ("The main thread's stack may have {}.", format_size),
}
UNLIMITED = {
    "wall_time": "time",
    "cpu_time": "processor time",
    "memory": "memory",
    "processes": "processes",
    "open_files": "open files",
    "disk": "disk space",
    "files": "the number of files",
    "output": "output",
    "stack": "stack",
}
"""Limits whose absence is worth a warning; each file's size and idleness are limited by others."""
BEST_EFFORT = {
    "own_uid": "a user id of its own on the host",
    "groups": "giving up the caller's groups",
    "cgroup": "counting memory, processor and processes of all together (cgroup)",
    "swap": "counting swap as memory",
    "landlock_net": "Landlock for TCP",
    "landlock_scope": "Landlock for abstract sockets and signals",
    "nested_userns": "forbidding user namespaces within",
    "apparmor": "the AppArmor profile",
    "selinux": "the SELinux context",
    "cpus": "the share of the processors",
    "cpuset": "the choice of processors",
    "io": "the share of the disks",
}


def sentences(policy: Policy) -> list[str]:
    """The policy as lines: a heading, then its sentences, each indented by two spaces. Raises PolicyError for unknown system call sets."""
    lines = [f"{policy.name}: {policy.description}" if policy.description else policy.name]
    for heading, section in SECTIONS.items():
        lines += [f"{heading}:", *(f"  {sentence}" for sentence in section(policy))]
    return lines


def _allowed(policy: Policy) -> Iterator[str]:
    yield ROOTS.get(policy.root, f"It sees the root file system in {policy.root}, read-only.")
    if policy.workdir is not None:
        yield f"{policy.workdir} of the host is /work: it may read and change everything in it, and what it leaves stays."
    else:
        yield "It may write into /work, /tmp and /dev/shm, which begin empty and are thrown away."
    if policy.python.project is not None:
        yield f"It may read {policy.python.project} of the host at /project."
    for mount in policy.mounts:
        words = f"{'read and change' if mount.writable else 'read'}{', and execute what is in it' if mount.executable else ''}"
        yield f"It may {words}: {mount.source} of the host, at {mount.target}."
    if policy.env_pass:
        yield f"It is given the caller's variables {', '.join(policy.env_pass)}, where they are set."
    if policy.exec_in_writable and (policy.syscalls is None or policy.syscalls.exec):
        yield "It may execute programs that it wrote itself."
    if policy.nested_userns:
        yield "It may make user namespaces, and in them all that the kernel lets their root do: mounts, networks, jails."
    if "net" not in policy.namespaces:
        yield "It may use the network of the host, all of it."
    elif policy.loopback and _has_inet(policy):
        yield "It may use a loopback network of its own."
    if policy.syscalls is None:
        yield "It may make any system call that the kernel lets an unprivileged user make."
        return
    from .syscalls import sets

    known = sets()
    for name in dict.fromkeys(("@essential", *policy.syscalls.allow)):
        yield f"{name}: {known[name[1:]]}." if name[1:] in known and name.startswith("@") else f"{name}: the system call of this name."
    if policy.syscalls.deny:
        yield f"Taken out again: {', '.join(policy.syscalls.deny)}."
    if policy.syscalls.exec:
        yield "It may execute further programs."


def _limited(policy: Policy) -> Iterator[str]:
    for name, (sentence, form) in LIMITS.items():
        value = getattr(policy.limits, name)
        if value is not None:
            yield sentence.format(form(value))
    if policy.syscalls is not None:
        fails = "ends the run" if policy.syscalls.on_denied == "kill" else "fails with EPERM and is named in the result"
        yield f"Any other system call {fails}."
    if policy.apparmor:
        yield f"AppArmor holds it to the profile {policy.apparmor}."
    if policy.selinux:
        yield f"SELinux holds it to the context {policy.selinux}."


def _hidden(policy: Policy) -> Iterator[str]:
    yield "Other processes of the host: it sees its own only, and its end is the end of all of them."
    if policy.proc == "none":
        yield "/proc: there is none."
    elif policy.proc == "pid":
        yield "All of /proc but its own processes."
    else:
        yield "The files of /proc that tell about the host or steer it; the others can be seen."
    yield "The caller's environment and open files, but for what is passed on by name."
    if "net" in policy.namespaces:
        yield "The host's network, abstract sockets included."
    if "ipc" in policy.namespaces:
        yield "System V shared memory, semaphores and message queues of the host."
    if "uts" in policy.namespaces:
        yield f"The host's name: inside it is {policy.hostname}."
    if "cgroup" in policy.namespaces:
        yield "Its place among the host's cgroups."
    if "time" in policy.namespaces:
        yield "How long the host has been up."
    if policy.own_uid:
        yield "Who started it: on the host it has a user id that nothing else has."
    if policy.landlock:
        yield "Landlock repeats the file system view, and refuses TCP and foreign abstract sockets, in a second layer."


def _not_stopped(policy: Policy) -> Iterator[str]:
    if policy.root == "host":
        yield "It can read every file that all users may read; without a user id of its own, every file of the caller, secrets included."
    if "net" not in policy.namespaces:
        yield "It can send what it reads to anybody that the host can reach."
    if policy.syscalls is None:
        yield "The whole interface of the kernel is open to it: there is no filter."
    for name, words in UNLIMITED.items():
        if getattr(policy.limits, name) is None:
            yield f"Nothing of its own limits {words}."
    for mount in policy.mounts:
        if mount.writable:
            yield f"It can destroy or fill {mount.source} of the host."
    if policy.workdir is not None:
        yield f"It can fill {policy.workdir} of the host: the disk limit does not count there."
    if policy.best_effort:
        missing = "; ".join(BEST_EFFORT[name] for name in dict.fromkeys(policy.best_effort))
        yield f"Where the host cannot give it, and then the result says so: {missing}."
    yield "Faults of the kernel in the calls that are allowed, and side channels through the processor, are not stopped by any policy."


def _has_inet(policy: Policy) -> bool:
    return policy.syscalls is None or "@inet-sockets" in policy.syscalls.allow


SECTIONS: dict[str, Callable[[Policy], Iterator[str]]] = {
    "allowed": _allowed,
    "limited": _limited,
    "hidden": _hidden,
    "not stopped": _not_stopped,
}
