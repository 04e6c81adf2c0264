"""What the others take to run a program: each as its own documents have it, with the isolation that it gives by itself.

Only what is installed takes part; `./dev bench --peers` installs those that apt and PyPI have.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

import nsjail_py
from nsjail_py import policyfile

Once = Callable[[], object]
NAMESPACES = "user, mount, pid, net, ipc, uts"
BWRAP = "--unshare-all --ro-bind /usr /usr --symlink usr/lib /lib --symlink usr/lib64 /lib64 --symlink usr/bin /bin --proc /proc --dev /dev"


class Peer(NamedTuple):
    """One way to start a program."""

    once: Once
    protections: str


def spawn(command: list[str], environment: dict[str, str] | None = None) -> Once:
    """A program and its end, as cheaply as there is."""

    def once() -> None:
        pid = os.posix_spawn(command[0], command, os.environ if environment is None else environment)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise SystemExit(f"{command} failed")

    return once


def _sandlock(command: list[str]) -> Once | None:
    """Its own API, as an application would use it."""
    try:
        from sandlock import Sandbox
    except (ImportError, OSError):
        return None
    sandbox = Sandbox(fs_readable=["/usr", "/lib", "/lib64", "/bin", "/etc"])

    def once() -> None:
        if not sandbox.run(command).success:
            raise SystemExit("sandlock failed")

    return once


def _runtime(name: str, command: list[str]) -> Once:
    base = policyfile.load("untrusted")
    assert base.syscalls
    jail = nsjail_py.Jail(replace(base, backend=f"oci:{name}", landlock=False, syscalls=replace(base.syscalls, exec=True)))
    return lambda: jail.run(command).check()


def forkserver() -> Once:
    """CPython's own way to a fresh interpreter that has its modules."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["__main__"])  # else each child imports this program anew

    def once() -> None:
        process = server.Process(target=os.getpid)
        process.start()
        process.join()

    return once


def programs(command: list[str]) -> dict[str, Peer]:
    """Everything here that runs a program behind something."""
    found: dict[str, Peer] = {}
    if path := shutil.which("unshare"):
        found["unshare"] = Peer(spawn([path, "-Ufpmnui", "--mount-proc", *command]), f"namespaces: {NAMESPACES}; the host's files")
    if path := shutil.which("bwrap"):
        found["bubblewrap --unshare-all"] = Peer(
            spawn([path, *BWRAP.split(), *command]), f"namespaces: {NAMESPACES}, cgroup; own root, no new privileges"
        )
    if once := _sandlock(command):
        found["sandlock"] = Peer(once, "Landlock, system call filter; no namespaces")
    if path := shutil.which("firejail"):
        found["firejail"] = Peer(
            spawn([path, "--quiet", "--noprofile", "--net=none", "--", *command]),
            "namespaces: mount, pid, ipc, net; the host's files, set-user-id",
        )
    for name, what in (
        ("crun", "`untrusted` as a bundle: without Landlock and a user of its own"),
        ("runsc", "`untrusted` as a bundle, behind a kernel in user space (gVisor)"),
    ):
        if shutil.which(name) and os.geteuid() == 0:
            found[f"{name}, by our backend"] = Peer(_runtime(name, command), what)
    return found
