"""Templates: a warm interpreter in a jail of its own, from which jobs are forked, each into a jail of its own (native/job.c).

A template never sees anything of a job: orders, input and environment go to the fork. It lives as long as its Jail, for a bounded number of
jobs and a bounded time; what its jobs share, and what is made unique in each, docs/how-it-works.md tells.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import weakref
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from . import launcher
from ._native import lib
from .compiled import Compiled, Host, for_python
from .errors import CLOSED, JailError, PolicyError, SetupError, during
from .plan import OrderFile, Sealed, as_template, compile_order, shared
from .policy import Policy
from .reports import STEP_NAMES, Context, parse, setup_error
from .streams import ready
from .warm_inside import ONE_THREAD

HERE = Path(__file__).parent
NEEDED = ("recvmsg", "sendmsg", "fstat", "fcntl", "dup3", "prlimit64")
"""What a job that waits calls under its own filter, the last of its own limits."""
MOST_JOBS = 1000
JOB_SIZE = 1 << 20
"""What process 1 of a job and its namespaces are for the kernel, which counts them for the template; twice that."""
OLDEST_S = 600.0
AGEING = 0.8
"""When the next one is begun, as a share of either."""
START_S = 60.0
DOUBT_S = 0.5
"""How long the end of a killed template may come behind that of its jobs."""
DRAWN_FD = 3
PROBE = f"""
import sys
drawn = open({DRAWN_FD}, "w")
for name, draw in (
    ("random", lambda m: m.random()), ("numpy.random", lambda m: m.random_sample()), ("_ssl", lambda m: m.RAND_bytes(8).hex()),
    ("tempfile", lambda m: next(m._get_candidate_names())), ("uuid", lambda m: m.uuid4().hex), ("ctypes", lambda m: m.CDLL(None).rand()),
):
    if name in sys.modules: print(name, draw(sys.modules[name]), file=drawn, flush=True)
"""


def with_imports(policy: Policy, preload: tuple[str, ...]) -> Policy:
    """The policy with the distributions that the preloaded modules come from. Raises PolicyError for a module that nobody brings."""
    missing = [name for name in dict.fromkeys(module.partition(".")[0] for module in preload) if name not in sys.stdlib_module_names]
    if not missing:
        return policy
    known = packages_distributions()
    unknown = [name for name in missing if name not in known]
    if unknown:
        raise PolicyError(f"preload: no installed distribution brings {', '.join(map(repr, unknown))}")
    added = [known[name][0] for name in missing]
    return replace(policy, python=replace(policy.python, imports=tuple(dict.fromkeys((*policy.python.imports, *added)))))


class Template:
    """One warm interpreter. Raises JailError with what it said when it cannot be had."""

    def __init__(self, policy: Policy, preload: tuple[str, ...], host: Host, environment: dict[str, str]) -> None:
        self.compiled = _checked(for_python(policy, host))
        self.number = next(launcher.numbers)
        self.jobs, self.started, self.succeeded = 0, time.monotonic(), False
        self._patience = 0.0
        own = for_python(_own(policy), host)
        argv = [own.program, "-s", "/app/template.py", *preload]
        files = [OrderFile("template.py", (HERE / "warm_inside.py").read_bytes())]
        order = compile_order(own.program, argv, environment | dict.fromkeys(ONE_THREAD, "1"), files, range(6))
        with during("template"):
            read, write = os.pipe2(os.O_CLOEXEC)
        with open(read, "rb", 0) as said:
            with (
                during("template"),
                open(write, "wb", 0) as stderr,
                open(HERE / "_template.abi3.so", "rb") as extension,
                open(launcher.PROGRAM, "rb") as reaper,
            ):
                plan = Sealed("plan", self.compiled.plan)
                standard = [stderr.fileno()] * 3  # pipes, as a job's are: what a file object knows of its descriptor it does not ask again
                passed = [*standard, extension.fileno(), reaper.fileno(), plan.fd]
                self.launcher, self.channel = launcher.submit(as_template(own.plan), order, passed, 0, self.number)
            self.close = weakref.finalize(self, _end, self.launcher, self.channel, self.number)
            """Ends it, and the jobs that are left."""
            try:
                self._wait(said.fileno(), own)
            except BaseException:
                self.close()
                raise

    def _wait(self, said: int, own: Compiled) -> None:
        """Until it serves."""
        text, deadline = b"", time.monotonic() + START_S
        waiting = [self.channel.fileno(), said]
        while True:
            heard = ready(waiting, deadline - time.monotonic())
            if not heard:
                raise JailError(f"the template did not start within {START_S:.0f} s")
            if said in heard:
                data = os.read(said, 65536)
                text = (text + data)[-4096:]
                if not data:
                    waiting.remove(said)
            if self.channel.fileno() not in heard:
                continue
            message = self.channel.recv(1 << 16)
            report = parse(message) if message else None
            if report is not None and report.kind == lib.REPORT_STARTED:
                return
            if report is not None and report.kind == lib.REPORT_FAILED:
                launcher.unmade(self.launcher, report)
                context = Context(own.policy, self.launcher.claim.mode, own.mounts, own.protections)
                raise setup_error(STEP_NAMES[report.step], report, context)
            with contextlib.suppress(OSError):
                os.set_blocking(said, False)
                text += os.read(said, 65536)
            raise SetupError("template", detail=text.decode(errors="replace").strip().rpartition("\n")[2] or "it ended before it was ready")

    def doubt(self) -> None:
        """After a job that could not be had: of a template that is killed the jobs may be gone some time before it is."""
        self._patience = DOUBT_S

    @property
    def alive(self) -> bool:
        patience, self._patience = self._patience, 0.0
        return self.launcher is launcher.peek() and not ready([self.channel.fileno()], patience)

    @property
    def used(self) -> float:
        """1 when it has served for long enough: what its jobs share is not to be shared by too many."""
        return max(self.jobs / MOST_JOBS, (time.monotonic() - self.started) / OLDEST_S)


def _end(its: launcher.Launcher, channel: socket.socket, number: int) -> None:
    channel.close()
    its.forget(number)


def _own(policy: Policy) -> Policy:
    """The template's own jail: no filter and no Landlock, which its jobs would inherit, no clock, and room for their processes, for what
    these cost the kernel, and for descriptors on the way: a new job sends its own under this limit, where others count as well
    (native/template.c)."""
    memory = policy.limits.memory and policy.limits.memory + MOST_JOBS * JOB_SIZE
    limits = replace(policy.limits, wall_time=None, cpu_time=None, idle_time=None, open_files=None, processes=None, memory=memory)
    return replace(policy, syscalls=None, landlock=False, limits=limits)


def _checked(compiled: Compiled) -> Compiled:
    policy = compiled.policy
    if not shared(compiled.mounts):
        raise PolicyError("preload: a policy that shows files of the host (mounts, workdir, project, root) has no warm interpreter")
    if policy.nested_userns:
        raise PolicyError(
            "preload: with nested_userns there is no warm interpreter: the namespaces of its jobs would count as the program's"
        )
    if policy.syscalls is not None:
        from .syscalls import calls_of

        lacking = sorted(set(NEEDED) - set(calls_of(policy.syscalls)))
        if lacking:
            raise PolicyError(f"preload: the jobs of a warm interpreter need the system calls {', '.join(lacking)}")
    return compiled


class Templates:
    """The current template of one Jail, replaced when it is dead, or spent; the next one is begun before that. From any thread."""

    def __init__(self, policy: Policy, preload: tuple[str, ...]) -> None:
        self.policy, self.preload = policy, preload
        self._closed = False
        self.inherited()
        launcher.inheritable.add(self)

    def inherited(self) -> None:
        """In a forked child: the parent's is not ours, and whoever made it there does not go on here."""
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._current: Template | None = None

    def take(self, host: Host, probe: Any) -> Template:
        """The template for one job more."""
        while True:
            with self._lock:
                if self._closed:
                    raise JailError(CLOSED)
                current = self._current
                if current is not None and current.alive and (used := current.used) < 1:
                    current.jobs += 1
                    ageing = used > AGEING and not current.succeeded
                    current.succeeded |= ageing
                    break
            self._renew(current, host, probe)
        if ageing:
            with contextlib.suppress(RuntimeError):  # no thread: whoever comes when this one is spent makes the next
                threading.Thread(target=self._succeed, args=(current, host, probe), name="jail-template").start()
        return current

    def _succeed(self, *arguments: Any) -> None:
        """Before anybody waits. A failure is told to whoever comes when the current one is spent, if it is one then, too."""
        with contextlib.suppress(Exception):
            self._renew(*arguments)

    def _renew(self, old: Template | None, host: Host, probe: Any) -> None:
        """Another in the place of `old`, unless somebody else has just made one."""
        with self._making:
            if self._closed or self._current is not old:
                return
            from .jail import environment

            fresh = Template(self.policy, self.preload, host, environment(self.policy))
            try:
                _unique(probe(fresh), probe(fresh))
                with self._lock:
                    if self._closed:
                        raise JailError(CLOSED)
                    self._current = fresh
            except BaseException:
                fresh.close()
                raise

    def close(self) -> None:
        """For good: a run that was on its way meanwhile starts no other."""
        with self._lock:
            self._closed = True
            if self._current is not None:
                self._current.close()
            self._current = None


def _unique(first: bytes, second: bytes) -> None:
    """Two jobs drew random numbers from everything that is loaded: none may be the same."""
    same = [a for a, b in zip(first.splitlines(), second.splitlines(), strict=True) if a == b]
    if same:
        raise SetupError("template", detail=f"two jobs draw the same random numbers: {b', '.join(same).decode()}")
