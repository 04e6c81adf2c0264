"""Runs under an OCI runtime: `backend = "oci:runsc"` puts a kernel in user space behind the policy, crun and runc the host's own.

A run is a bundle (oci_bundle.py) that lives as long as it. A thread speaks to our side what the launcher speaks, so that handle, streams
and result are those of any run; what a runtime does not tell is `unavailable`. A small shell waits for us to be gone and clears away:
after the end of a run, and after ours.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from . import launcher, oci_bundle
from ._native import ffi, lib
from .errors import PolicyError, SetupError, Unavailable
from .plan import OrderFile
from .policy import Policy
from .process import Process
from .result import Protection, Result
from .streams import Ends, ready

if TYPE_CHECKING:
    from .compiled import Compiled

OPTIONS = {"runsc": ("--network=none", "--oci-seccomp")}
"""Global options of a runtime, beside where it keeps its state."""
PACKAGES = {"crun": "crun", "runc": "runc", "runsc": "runsc"}
"""Debian's."""
SHARES_IDS = frozenset({"runsc"})
"""Without a user namespace: its root cannot read through our cache's directory, and the host sees its processes, not the program's."""
HYBRID = Path("/sys/fs/cgroup/unified")
"""Where version 2 of the control groups is mounted beside version 1."""
CLEAN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PATIENCE_S = 10.0
"""For a runtime that was told to kill."""
MAX_LOG = 4096
LABELS = ("apparmor", "selinux")
FAILED = 128
"""runsc's status for a container that it could not start; no signal gives it."""


def check(policy: Policy, warm: bool) -> str:
    """The runtime's path. Raises Unavailable when it is not installed, or for what the policy requires and it cannot give."""
    name = policy.backend.partition(":")[2]
    path = shutil.which(name, path=CLEAN_PATH)
    if path is None:
        package = PACKAGES.get(os.path.basename(name))
        advice = f"apt install {package}" if package else f"install it, or use one of {', '.join(sorted(PACKAGES))}"
        raise Unavailable("oci runtime", detail=f"{name!r} is not installed", advice=advice)
    if os.geteuid():
        raise Unavailable("oci runtime", detail="a bundle's user ids are root's to give", advice='run as root, or with backend = "native"')
    missing = _missing(policy, warm)
    if missing:
        changes = "; ".join(missing.values())
        raise Unavailable(
            "protections", detail=f"an OCI runtime cannot give: {', '.join(missing)}", advice=f"in policy {policy.name!r}: {changes}"
        )
    return path


def lacks(policy: Policy) -> tuple[str, ...]:
    """What the policy requires and its backend cannot give, or that there is none; for the posture."""
    try:
        check(policy, False)
    except Unavailable as error:
        return (f"backend: {error.detail}",)
    return ()


def _name(policy: Policy) -> str:
    return os.path.basename(policy.backend.partition(":")[2])


def _missing(policy: Policy, warm: bool) -> dict[str, str]:
    """What a policy requires and its runtime does not give, and the line that gives it up."""
    wanted = {
        "Landlock": (policy.landlock, "landlock = false"),
        "refusal of exec": (policy.syscalls is not None and not policy.syscalls.exec, "[syscalls] exec = true"),
        "an end at the first denied call": (
            policy.syscalls is not None and policy.syscalls.on_denied == "kill",
            '[syscalls] on_denied = "errno"',
        ),
        "a limit on idleness": (policy.limits.idle_time is not None, '[limits] idle_time = "unlimited"'),
        "a time namespace": ("time" in policy.namespaces, "take time out of namespaces"),
        "noexec for a single file that may be written": (
            oci_bundle.executes_files(policy, _name(policy)),
            "executable = true for it, or its directory",
        ),
        "a kept work directory": (policy.workdir is not None, "no workdir"),
        "a user id of its own": (policy.own_uid and "own_uid" not in policy.best_effort, 'best_effort = ["own_uid"]'),
        "user namespaces within": (policy.nested_userns, "nested_userns = false"),
        "a label of a security module": (
            any(getattr(policy, name) is not None and name not in policy.best_effort for name in LABELS),
            "no apparmor or selinux",
        ),
        "a share of the disks": (policy.limits.io is not None and "io" not in policy.best_effort, "no io in [limits]"),
        "refusal of user namespaces within": ("nested_userns" not in policy.best_effort, 'best_effort = ["nested_userns"]'),
        "telemetry of the interpreter": (policy.python.audit != "off", '[python] audit = "off"'),
        "preload": (warm, "no preload"),
    }
    return {name: line for name, (is_wanted, line) in wanted.items() if is_wanted}


class OciProcess(Process):
    """A run under a runtime."""

    def __init__(self, compiled: Compiled, argv: Sequence[str], files: Sequence[OrderFile], ends: Ends, pass_fds: Sequence[int]) -> None:
        self._files = files
        self.runtime = check(compiled.policy, False)
        if pass_fds:
            ends.close()
            raise PolicyError("pass_fds: an OCI runtime passes no descriptors of the caller's")
        super().__init__(compiled, b"", list(argv), ends, (), 0)

    def _submit(self, order: bytes, descriptors: list[int], stock: int) -> tuple[launcher.Launcher, socket.socket]:
        ours, its = launcher.pair()
        try:
            self._run = Run(self.runtime, self.compiled, self.args, self._files, descriptors, its)
        except BaseException:
            ours.close()
            its.close()
            raise
        return launcher.current(), ours

    def inherited(self) -> None:
        super().inherited()
        assert self._run.cleaner.stdin is not None
        self._run.cleaner.stdin.close()  # or it would wait for us, too

    def _finish(self) -> Result:
        self._run.thread.join()
        with self.lock:
            if self._result is None:
                if self._run.failed:
                    raise SetupError("oci runtime", detail=f"{os.path.basename(self.runtime)}: {self._run.failed}", advice="docs/oci.md")
                protections = told(self.compiled.policy, self.compiled.protections)
                self._result = replace(
                    super()._finish(), cpu_source="unavailable", memory_source="unavailable", peak_processes=None, protections=protections
                )
            return self._result


def told(policy: Policy, protections: Iterable[Protection]) -> tuple[Protection, ...]:
    """Protections, as the policy's runtime gives them."""
    lacks = {
        **{name: oci_bundle.BEYOND[name] for name in ("own_uid", "nested_userns", "io")},
        **dict.fromkeys(LABELS, oci_bundle.BEYOND["label"]),
        **dict.fromkeys(("landlock_fs", "landlock_net", "landlock_scope"), oci_bundle.BEYOND["landlock"]),
    }
    if _name(policy) in SHARES_IDS:
        lacks["user_namespace"] = "the runtime has a kernel of its own, and none is made of the host's"
        if policy.proc == "pid":
            lacks["private_proc"] = oci_bundle.BEYOND["private_proc"]
    return tuple(
        Protection(one.name, "unavailable", lacks[one.name]) if one.name in lacks and one.state != "not requested" else one
        for one in protections
    )


def surroundings(runtime: str) -> list[str]:
    """What a runtime is started through. crun refuses a host whose version 2 of the control groups has any controller beside version 1;
    where it sees no version 2, it uses the other. So there it has a mount namespace of its own."""
    if runtime != "crun" or not HYBRID.is_mount():
        return []
    return ["unshare", "--mount", "--propagation=private", "sh", "-c", f'umount {HYBRID} && exec "$@"', "sh"]


class Run:
    """One container, from its bundle to its report."""

    def __init__(
        self, runtime: str, compiled: Compiled, argv: Sequence[str], files: Sequence[OrderFile], streams: list[int], channel: socket.socket
    ) -> None:
        self.policy, self.channel, self.failed = compiled.policy, channel, ""
        launcher.LOCKS.mkdir(exist_ok=True)
        launcher.LOCKS.chmod(0o755)  # whatever the umask was
        self.top = Path(tempfile.mkdtemp(prefix="oci-", dir=launcher.LOCKS))
        self.top.chmod(0o755)
        self.name = self.top.name
        name = os.path.basename(runtime)
        self.command = [*surroundings(name), runtime, *OPTIONS.get(name, ()), f"--root={self.top}/state", f"--log={self.top}/log"]
        remove = shlex.join([*self.command, "delete", "--force", self.name])
        script = f"read -r line; {remove} >/dev/null 2>&1; rm -rf {shlex.quote(str(self.top))}"
        self.cleaner = subprocess.Popen(
            ["/bin/sh", "-c", script],
            stdin=subprocess.PIPE,
            env={"PATH": CLEAN_PATH},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            oci_bundle.write(compiled, self.top / "bundle", argv, files, own_ids=name not in SHARES_IDS, runtime=name)
            self.started = time.monotonic_ns()
            self.process = subprocess.Popen(
                [*self.command, "run", f"--bundle={self.top}/bundle", f"--pid-file={self.top}/pid", self.name],
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                env={"PATH": CLEAN_PATH},
                start_new_session=True,
            )
        except BaseException:
            self._clean()
            raise
        self.report: Any = ffi.new("struct report *", {"kind": lib.REPORT_ENDED, "exit_code": -1, "signal": -1, "request_ns": self.started})
        self.thread = threading.Thread(target=self._supervise, name=self.name, daemon=True)
        self.thread.start()

    def _supervise(self) -> None:
        try:
            self._watch()
            status = self.process.wait()
            self.report.end_ns = time.monotonic_ns()
            self.report.wall_ns = self.report.end_ns - self.started
            if status > 128 and status - 128 in set(signal.Signals):
                self.report.signal = status - 128  # as a shell has it: the runtime tells no more
            else:
                self.report.exit_code = status if status >= 0 else 255
            if (status == FAILED or not (self.top / "pid").exists()) and self.report.cause == lib.CAUSE_NONE:
                self.failed = self._said() or f"it ended with status {status} before the program began"
        finally:
            self._clean()
            self.report.answer_ns = time.monotonic_ns()
            with contextlib.suppress(OSError):
                self.channel.send(bytes(ffi.buffer(self.report)))
            self.channel.close()

    def _watch(self) -> None:
        """Until the runtime has ended: the clock, and what our side asks for."""
        limit = self.policy.limits.wall_time
        deadline = None if limit is None else self.started + int(limit * 1e9)
        ended = os.pidfd_open(self.process.pid)
        try:
            waiting = [ended, self.channel.fileno()]
            while True:
                rest = None if deadline is None else max(0.0, (deadline - time.monotonic_ns()) / 1e9)
                heard = ready(waiting, rest)
                if ended in heard:
                    return None
                if not heard:
                    self.report.observed = time.monotonic_ns() - self.started
                    return self._kill(lib.CAUSE_WALL, ended)
                if self._obey(ended):
                    return None
        finally:
            os.close(ended)

    def _obey(self, ended: int) -> bool:
        """One command; true when it was to kill."""
        command = ffi.new("struct command *", {"cause": lib.CAUSE_CALLER})
        data = self.channel.recv(ffi.sizeof("struct command"))
        if len(data) == ffi.sizeof("struct command"):
            ffi.buffer(command)[:] = data
        if command.signal:
            self._call("kill", self.name, str(command.signal))
        elif command.cause == lib.CAUSE_NONE:
            started = ffi.new("struct report *", {"kind": lib.REPORT_STARTED, "exit_code": -1, "signal": -1, "pid": self._pid()})
            self.channel.send(bytes(ffi.buffer(started)))
        else:
            self._kill(command.cause, ended)
            return True
        return False

    def _kill(self, cause: int, ended: int) -> None:
        self.report.cause = cause
        until = time.monotonic() + PATIENCE_S
        while not ready([ended], 0.2):  # it may only just be starting
            self._call("kill", self.name, "KILL")
            if time.monotonic() > until:
                self.process.kill()
                return

    def _call(self, *words: str) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*self.command, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": CLEAN_PATH},
                timeout=PATIENCE_S,
                check=False,
            )

    def _pid(self) -> int:
        until = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError, ValueError):
                return int((self.top / "pid").read_text())
            time.sleep(0.01)
        return 0

    def _said(self) -> str:
        with contextlib.suppress(OSError):
            with (self.top / "log").open("rb") as file:
                text = file.read(MAX_LOG).decode(errors="replace")
            return " ".join((text.strip().splitlines() or [""])[-1].split())
        return ""

    def _clean(self) -> None:
        assert self.cleaner.stdin is not None
        self.cleaner.stdin.close()
        self.cleaner.wait()
