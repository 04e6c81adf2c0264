"""What the others take to run a program: each as its own documents have it, with the isolation that it gives by itself.

Only what is installed takes part; `./dev bench --peers` installs those that apt and PyPI have.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
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


def timed(stack: ExitStack, source: str, *arguments: str) -> Once:
    """A program of its own that does it once for each line that it reads, and takes its own time: the pipe to it does not count."""
    caller = stack.enter_context(
        subprocess.Popen([sys.executable, "-c", source, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    stack.callback(caller.stdin.close)

    def once() -> float:
        caller.stdin.write("\n")
        caller.stdin.flush()
        return float(caller.stdout.readline())

    return once


FORKSERVER = """
import multiprocessing, os, sys, time
server = multiprocessing.get_context("forkserver")
for _ in sys.stdin:
    begin = time.perf_counter()
    process = server.Process(target=os.getpid)
    process.start()
    process.join()
    print((time.perf_counter() - begin) * 1000, flush=True)
"""
"""CPython's own way to a fresh interpreter that has its modules. A program without a file: else each child imports it anew."""


FORKED = """
import gc, os, sys, time
source = sys.argv[1]
def run(): exec(compile(source, "job", "exec"), {})
run(); run()
gc.collect(); gc.freeze()
for _ in sys.stdin:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        run()
        os.read(ours, 1)
        run()
        os._exit(0)
    time.sleep(0.01)
    begin = time.perf_counter()
    os.write(theirs, b"1")
    os.waitpid(child, 0)
    print((time.perf_counter() - begin) * 1000, flush=True)
    os.close(ours); os.close(theirs)
"""
"""What no warm job can be quicker than: a fork that has rehearsed and waits, runs a program, and ends."""


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
