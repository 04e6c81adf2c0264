"""Running things: `run`, `run_python`, `Jail` and the handle of a run, `Process`.

    policy -> plan -> launch -> inside -> watch -> result

Made for use from any number of threads at once. aio.py has the same for asyncio.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from msgspec import structs

from . import launcher
from ._native import ffi, lib
from .compiled import PATH, Compiled, Host, for_program, for_python
from .errors import JailError, LauncherDied, PolicyError, SetupError
from .plan import OrderFile, compile_order
from .policy import Policy
from .policyfile import load, override
from .reports import Context, parse, to_result
from .result import Result
from .streams import DEVNULL, PIPE, STDOUT, Ends, Exchange, Stream, captured, no_directory, ready, split

if TYPE_CHECKING:
    from .cgroups import Claim
    from .layers.audit import Page
    from .session import Session
    from .warm import Template, Templates

__all__ = ["DEVNULL", "PIPE", "STDOUT", "Jail", "Process", "run", "run_python"]

STOCK = 2
"""How many jails wait for the next runs of one program under one policy, where a Jail does not say."""
MAX_STOCK = 64
Args = Sequence[str | os.PathLike[str]]


class Process:
    """A run that has been started: like subprocess.Popen, but in a jail, and its end is a Result.

    stdin, stdout and stderr are binary files where PIPE was asked for, else None. A handle that is dropped kills its run.
    """

    def __init__(
        self,
        compiled: Compiled,
        order: bytes,
        args: list[str],
        ends: Ends,
        pass_fds: Sequence[int],
        stock: int,
        template: Template | None = None,
        page: Page | None = None,
    ) -> None:
        self.compiled = compiled
        self.page = page
        self.template = template
        """Kept alive by its jobs, to their end."""
        self.args = args
        self.reported: Any = None
        self._pid: int | None = None
        self._result: Result | None = None
        self._exchange: Exchange | None = None
        self._lost = False
        self._begin_ns, self._heard_ns = time.monotonic_ns(), 0
        self._ends = ends
        self.stdin: IO[bytes] | None
        self.stdout: IO[bytes] | None
        self.stderr: IO[bytes] | None
        self.stdin, self.stdout, self.stderr = files = ends.files()
        try:
            self.launcher, self.channel = self._submit(order, [*ends.inside, *pass_fds], stock)
        except BaseException:
            for file in files:
                if file is not None:
                    file.close()
            ends.close()
            raise
        ends.sent()
        self._finalizer = weakref.finalize(self, self.channel.close)

    def _submit(self, order: bytes, descriptors: list[int], stock: int) -> tuple[launcher.Launcher, socket.socket]:
        plan, template = self.compiled.plan, self.template
        if template is None:
            return launcher.submit(plan, order, descriptors, stock)
        try:
            return template.launcher, template.launcher.submit(plan, order, descriptors, stock, template.number)
        except (BrokenPipeError, ConnectionResetError):
            launcher.lost(template.launcher)
            raise LauncherDied("the launcher ended, and the warm interpreter with it; the next run starts new ones") from None

    @property
    def pid(self) -> int | None:
        """The program's process id on the host, once it runs; None when it never did."""
        if self._pid is None and not self.reported:
            self._command(0, lib.CAUSE_NONE)
        while self._pid is None and not self.reported:
            ready([self.channel.fileno()], None)
            self.hear()
        return self._pid

    def hear(self) -> bool:
        """Takes one message from the launcher; true when it was the last."""
        if self.reported:
            return True
        message = self._receive()
        if not message:
            self.reported = ffi.new("struct report *", {"kind": lib.REPORT_FAILED, "step": lib.STEP_REQUEST})
            if not self.launcher.alive:
                self._lost = True
                launcher.lost(self.launcher)
            return True
        report = parse(message)
        if report.kind == lib.REPORT_STARTED:
            self._pid = report.pid or None  # 0: it has ended already, or /proc cannot be read
            return False
        self.reported, self._heard_ns = report, time.monotonic_ns()
        return True

    def _receive(self) -> bytes:
        """One message, empty at the end. A command that the launcher no longer read shows as one reset, before what it had sent."""
        for _ in range(2):
            with contextlib.suppress(ConnectionResetError):
                return self.channel.recv(1 << 16)
        return b""

    def poll(self) -> Result | None:
        """The result if the run is over, else None. Does not wait."""
        while not self.reported and ready([self.channel.fileno()], 0):
            self.hear()
        return self._finish() if self.reported else None

    def wait(self, timeout: float | None = None) -> Result:
        """The result, without reading the pipes. Raises subprocess.TimeoutExpired after timeout seconds; the run goes on then."""
        while not self.reported:
            if not ready([self.channel.fileno()], timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.hear()
        return self._finish()

    def communicate(self, input: bytes | None = None, timeout: float | None = None) -> Result:
        """Feeds input, reads all output and gives the result with it. Raises subprocess.TimeoutExpired; it may be called again then."""
        self.exchange(input).run(timeout)
        return self._finish()

    def stream(self, input: bytes | None = None) -> Iterator[tuple[str, bytes]]:
        """Feeds input and gives the output as it comes: ("stdout" or "stderr", bytes), to the end of the run; `wait` has the result then,
        without what was given here. Beyond the policy's limit of output the run is ended, as in communicate."""
        exchange = self.exchange(input)
        while not self.reported:
            exchange.wait(None)
            yield from exchange.taken()
        yield from exchange.taken()

    def exchange(self, input: bytes | None = None) -> Exchange:
        """The transfer of this run's streams, made on first use."""
        if self._exchange is None:
            self._exchange = Exchange(self, input)
        return self._exchange

    def kill(self) -> None:
        """Ends the whole jail. Harmless when the run is over."""
        self._command(0, lib.CAUSE_CALLER)

    def terminate(self) -> None:
        """Sends SIGTERM to the program."""
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        """Sends a signal to the program itself, not to its children."""
        self._command(signal.Signals(number), lib.CAUSE_NONE)

    def exceeded_output(self) -> None:
        """Ends the run because it wrote more than its policy lets it."""
        self._command(0, lib.CAUSE_OUTPUT)

    def _command(self, number: int, cause: int) -> None:
        command = ffi.new("struct command *", {"signal": number, "cause": cause})
        with contextlib.suppress(OSError):
            self.channel.send(bytes(ffi.buffer(command)), socket.MSG_NOSIGNAL)

    def _finish(self) -> Result:
        if self._result is None:
            self._finalizer()
            self.template = None
            self._ends.finish()
            if self._lost:
                raise LauncherDied("the launcher ended in the middle of the run, and the jail with it; the next run starts a new one")
            self._result = to_result(self.reported, self._context())
            if self.page is not None:
                self._result = structs.replace(self._result, audit=self.page.read())
                self.page.close()
        return self._result

    def _context(self) -> Context:
        done = self._exchange
        context = Context(
            self.compiled.policy,
            self.launcher.claim.mode,
            self.compiled.mounts,
            self.compiled.protections,
            begin_ns=self._begin_ns,
            heard_ns=self._heard_ns,
        )
        if done is None:
            return context
        stdout, stderr = (b"".join(done.output[name]) for name in ("stdout", "stderr"))
        return context._replace(stdout=stdout, stderr=stderr, stdout_cut=done.cut["stdout"], stderr_cut=done.cut["stderr"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Kills the run if it is still going on, and closes the pipes: in this order, or a program that writes would end by SIGPIPE."""
        if not self.reported:
            self.kill()
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        if not self.reported:
            with contextlib.suppress(JailError):
                self.wait()


class Jail:
    """One policy, many runs, from any thread.

    policy: a Policy, the name of a shipped one, or the path of a TOML file. changes: fields that differ from it (limits by their names,
    `imports`, `env`, `mounts`, `workdir` ...; numbers or strings with units). Raises PolicyError with everything that is wrong.
    stock: how many jails wait for the next runs, made from the second run of a program on, and gone ten seconds after the last. 0: none.
    preload: modules that a warm interpreter has imported, from which `run_python` forks its runs (docs/how-it-works.md); the distributions
    that they come from are visible inside. Empty for a bare one; None: each run starts an interpreter. Close the Jail to end it.
    """

    def __init__(
        self,
        policy: Policy | str | os.PathLike[str] = "untrusted",
        *,
        stock: int | None = None,
        preload: Sequence[str] | None = None,
        **changes: Any,
    ) -> None:
        stock = STOCK if stock is None else stock
        if not 0 <= stock <= MAX_STOCK:
            raise PolicyError(f"stock = {stock}: from 0 to {MAX_STOCK}")
        self.stock = stock
        loaded = policy if isinstance(policy, Policy) else load(policy)
        self.policy = override(loaded, **changes)
        self.preload = None if preload is None else tuple(preload)
        self._sessions: dict[float | None, Jail] = {}
        self._sessions_lock = threading.Lock()
        self._templates: Templates | None = None
        self._known_host: tuple[Claim, Host] | None = None
        if self.policy.backend != "native":
            from .oci_backend import check

            check(self.policy, preload is not None)
        if preload is not None and self.policy.python.audit != "off":
            raise PolicyError('$.python.audit: a warm interpreter tells nothing: audit = "off", or no preload')
        if preload is not None:
            from .warm import Templates, with_imports

            if self.policy.apparmor or self.policy.selinux:
                raise PolicyError("preload: a label comes with exec, and the jobs of a warm interpreter have none: leave one of them out")
            self.policy = with_imports(self.policy, tuple(preload))
            if self.policy.python.aslr == "shared":
                self._templates = Templates(self.policy, tuple(preload))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the warm interpreter, if there is one, with its jobs and sessions. Nothing else is held between runs."""
        for jail in self._sessions.values():
            jail.close()
        if self._templates is not None:
            self._templates.close()

    def start(
        self, args: Args, *, stdin: Stream = None, stdout: Stream = None, stderr: Stream = None, pass_fds: Iterable[int] = ()
    ) -> Process:
        """Starts a program. args[0] is looked up as a shell does; FileNotFoundError and PermissionError as from subprocess."""
        argv = [os.fspath(arg) for arg in args]
        if not argv:
            raise PolicyError("no program: the argument list is empty")
        compiled = self.compiled_for(argv[0])
        return self._start(compiled, argv, (), (stdin, stdout, stderr), tuple(pass_fds))

    def start_python(
        self,
        source: str | bytes,
        *,
        args: Args = (),
        filename: str = "main.py",
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        pass_fds: Iterable[int] = (),
    ) -> Process:
        """Starts a Python script. Inside it is /app/FILENAME. Raises ScriptRefused where the policy lets the scan refuse one."""
        data = source.encode() if isinstance(source, str) else source
        if "/" in filename or filename in ("", ".", ".."):
            raise PolicyError(f"filename {filename!r} must be a name without directories")
        if self.policy.python.scan != "off":
            from .layers.scan import before_run

            before_run(self.policy, data, filename)
        streams = (stdin, stdout, stderr)
        if self._templates is not None:
            template = self._templates.take(self._host(), environment(self.policy), self._probe)
            return self._start_job(template, data, args, filename, streams, tuple(pass_fds))
        compiled = for_python(self.policy, self._host())
        argv = [compiled.program, "-s", f"/app/{filename}", *(os.fspath(arg) for arg in args)]
        files: tuple[OrderFile, ...] = (OrderFile(filename, data),)
        page = None
        if self.policy.python.audit != "off":
            from .layers.audit import Page

            page = Page(self.policy)
            argv[2:2], files = page.arguments(), files + page.files()
        return self._start(compiled, argv, files, streams, tuple(pass_fds), page=page)

    def _start_job(
        self, template: Template, data: bytes, args: Args, filename: str, streams: Sequence[Stream], pass_fds: tuple[int, ...]
    ) -> Process:
        argv = [template.compiled.program, "-s", f"/app/{filename}", *(os.fspath(arg) for arg in args)]
        return self._start(template.compiled, argv, (OrderFile(filename, data),), streams, pass_fds, template)

    def start_own(self, name: str, descriptors: Mapping[int, int], streams: Sequence[Stream]) -> Process:
        """For JailExecutor and Session: NAME_inside.py. descriptors: by the numbers that it knows them by, rising from 3 on."""
        if self.policy.python.audit != "off":
            raise PolicyError('$.python.audit: a session tells nothing: audit = "off", or single runs')
        template = None
        if self._templates is not None:
            template = self._templates.take(self._host(), environment(self.policy), self._probe)
        compiled = for_python(self.policy, self._host()) if template is None else template.compiled
        argv = [compiled.program, "-s", f"/app/{name}.py"]
        files = (OrderFile(f"{name}.py", own_script(name)),)
        order = compile_order(compiled.program, argv, environment(self.policy), files, [0, 1, 2, *descriptors])
        return Process(compiled, order, argv, Ends(*streams), list(descriptors.values()), self.stock, template)

    def session(self, lifetime: float | None = None) -> Session:
        """One interpreter for many cells of code (session.py), forked from the warm one where there is `preload`. The policy's limits of
        time are those of each cell. lifetime: seconds after which the whole session ends. A session may fork, whatever the policy says."""
        from .session import Session, inner_jail

        with self._sessions_lock:
            if lifetime not in self._sessions:
                self._sessions[lifetime] = inner_jail(self, lifetime)
        return Session(self._sessions[lifetime], self.policy.limits)

    def _probe(self, template: Template) -> bytes:
        from .warm import PROBE

        job = self._start_job(template, PROBE.encode(), (), "probe.py", (None, PIPE, None), ())
        result = _to_end(job, None, None)
        if not result.ok:
            raise SetupError("template", detail=f"its first job: {result.summary}")
        return result.stdout

    def run(self, args: Args, *, input: bytes | None = None, timeout: float | None = None, **streams: Any) -> Result:
        """Runs a program to its end and returns its result; output is captured unless stdout and stderr say otherwise."""
        return _to_end(self.start(args, **captured(input, streams)), input, timeout)

    def run_python(
        self,
        source: str | bytes,
        *,
        args: Args = (),
        filename: str = "main.py",
        input: bytes | None = None,
        timeout: float | None = None,
        **streams: Any,
    ) -> Result:
        """Runs a Python script to its end and returns its result."""
        return _to_end(self.start_python(source, args=args, filename=filename, **captured(input, streams)), input, timeout)

    def compiled_for(self, program: str) -> Compiled:
        """What the policy comes to on this host for a program. Raises FileNotFoundError and PermissionError."""
        return for_program(self.policy, self._host(), program)

    def _host(self) -> Host:
        claim = launcher.current().claim
        if self._known_host is None or self._known_host[0] is not claim:
            self._known_host = claim, Host.of(claim)
        return self._known_host[1]

    def _start(
        self,
        compiled: Compiled,
        argv: list[str],
        files: Sequence[OrderFile],
        streams: Sequence[Stream],
        pass_fds: tuple[int, ...],
        template: Template | None = None,
        page: Page | None = None,
    ) -> Process:
        extra = page.passed if page else ()
        if any(not 3 <= fd < (extra[0][0] if extra else lib.MAX_FD_NUMBER) for fd in pass_fds) or len(
            set(pass_fds)
        ) > lib.MAX_FDS - 3 - len(extra):
            raise PolicyError(f"pass_fds: at most {lib.MAX_FDS - 3} descriptors with numbers from 3 to {lib.MAX_FD_NUMBER - 1}")
        numbers = sorted(set(pass_fds))
        for number in numbers:
            no_directory(number)
        if compiled.policy.backend != "native":
            from .oci_backend import OciProcess

            return OciProcess(compiled, argv, files, Ends(*streams, only_pipes=True), numbers)
        inside = [0, 1, 2, *numbers, *(number for number, _ in extra)]
        order = compile_order(compiled.program, argv, environment(compiled.policy), files, inside)
        passed = [*numbers, *(descriptor for _, descriptor in extra)]
        return Process(compiled, order, argv, Ends(*streams), passed, self.stock, template, page)


@functools.cache
def own_script(name: str) -> bytes:
    return Path(__file__).with_name(f"{name}_inside.py").read_bytes()


def environment(policy: Policy) -> dict[str, str]:
    """The whole environment inside. Nothing of the caller's is in it but what the policy names."""
    variables = {"PATH": PATH, "HOME": "/work", "LANG": "C.UTF-8", "USER": "jail", "TMPDIR": "/tmp"}
    if policy.python.project:
        variables["PYTHONPATH"] = "/project"
    variables |= {name: os.environ[name] for name in policy.env_pass if name in os.environ}
    return variables | policy.env


def _to_end(process: Process, input: bytes | None, timeout: float | None) -> Result:
    with process:
        return process.communicate(input, timeout)


def run(args: Args, *, policy: Policy | str | os.PathLike[str] = "untrusted", **options: Any) -> Result:
    """Runs a program in a jail, like subprocess.run. options: streams, input and timeout as there; everything else changes the policy."""
    streams, changes = split(options)
    return Jail(policy, **changes).run(args, **streams)


def run_python(
    source: str | bytes,
    *,
    policy: Policy | str | os.PathLike[str] = "untrusted",
    args: Args = (),
    filename: str = "main.py",
    **options: Any,
) -> Result:
    """Runs Python source in a jail. options as for `run`."""
    streams, changes = split(options)
    return Jail(policy, **changes).run_python(source, args=args, filename=filename, **streams)
