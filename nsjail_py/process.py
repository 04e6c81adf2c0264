"""The handle of a run that has been started."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from msgspec import structs

from . import launcher
from ._native import ffi, lib
from .carrier import Bound, Carrier
from .compiled import Compiled
from .errors import JailError, LauncherDied, SetupError
from .reports import Context, parse, to_result
from .result import Result
from .streams import Ends, Exchange, deadline_of, left, ready

if TYPE_CHECKING:
    from .layers.audit import Page
    from .warm import Template


TURN_S = 0.05
"""Of several threads that wait for one message, one takes it, and the others are not woken."""
LINGER_S = 1.0
"""How long the end of a killed run waits for its output to be in the caller's files: a pipe that nobody reads may never take it."""


NO_OUTPUT = {"stdout": b"", "stderr": b""}
NOT_CUT = {"stdout": False, "stderr": False}


class _Waiting:
    __slots__ = ("_process",)

    def __init__(self, process: Process) -> None:
        self._process = process

    def __enter__(self) -> None:
        self._process._waits(1)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._process._waits(-1)


class Process:
    """A run that has been started: like subprocess.Popen, but in a jail, and its end is a Result. From any thread.

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
        self._counted: Any = None
        self._result: Result | None = None
        self._exchange: Exchange | None = None
        self._lost = False
        self.lock = threading.RLock()
        """Held while a message is taken or output moved, never while somebody waits for them."""
        self._waiting = 0
        self._inherited = False
        self._begin_ns, self._heard_ns = time.monotonic_ns(), 0
        self._ends = ends
        self.stdin: IO[bytes] | None
        self.stdout: IO[bytes] | None
        self.stderr: IO[bytes] | None
        self.stdin, self.stdout, self.stderr = files = ends.files()
        try:
            self.launcher, self._channel = self._submit(order, [*ends.inside, *pass_fds], stock)
        except BaseException:
            for file in files:
                if file is not None:
                    file.close()
            ends.close()
            raise
        self._bound = Bound(compiled.policy.limits.file_size, self)
        ends.sent(self._bound)
        self._finalizer = weakref.finalize(self, self._channel.close)
        launcher.inheritable.add(self)

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
    def channel(self) -> socket.socket:
        """Commands go out on it, and the report comes back. Raises JailError in a fork of the process that started the run."""
        self._is_ours()
        return self._channel

    def _is_ours(self) -> None:
        if self._inherited:
            raise JailError("the run belongs to the process that started it, and this is a fork of that")

    def inherited(self) -> None:
        """In a forked child: neither the report nor the output is ours to take, and nobody waits here for the input's end."""
        self._inherited, self._waiting, self.lock = True, 0, threading.RLock()
        self._close_pipes()
        for carrier in self._ends.carriers:
            carrier.let_go()

    @property
    def pid(self) -> int | None:
        """The program's process id on the host, once it runs; None when it never did."""
        with self.waiting():
            if self._pid is None and not self.reported:
                self._command(0, lib.CAUSE_NONE)
            while self._pid is None and not self.reported:
                ready([self.channel.fileno()], TURN_S)
                self.hear()
        return self._pid

    def counted(self) -> Any:
        """What is counted of the run by now, as a report; the last one when it is over."""
        with self.waiting():
            self._counted = None
            self._command(0, lib.CAUSE_NONE)
            while self._counted is None and not self.reported:
                ready([self.channel.fileno()], TURN_S)
                self.hear()
            return self.reported or self._counted

    def waiting(self) -> _Waiting:
        """What somebody waits for stays open: else its number may be another file's. The last to wait closes it when the run is over."""
        return _Waiting(self)

    def _waits(self, change: int) -> None:
        """One more that waits, or one less."""
        with self.lock:
            self._waiting += change
            if change < 0 and self.reported and not self._waiting:
                self.let_go()

    def let_go(self) -> None:
        """Closes our end, which kills a run that goes on."""
        self._finalizer()
        if self._exchange is not None:  # fed, and read to their end
            self._close_pipes()

    def _close_pipes(self) -> None:
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None and not file.closed:
                with contextlib.suppress(OSError):
                    file.close()

    def hear(self) -> bool:
        """Takes the launcher's message, if there is one; true when it was the last."""
        with self.lock:
            if not self.reported and (message := self._receive()) is not None:
                self._take(message)
            return bool(self.reported)

    def _take(self, message: bytes) -> None:
        if message:
            report = parse(message)
            if report.kind == lib.REPORT_STARTED:
                self._pid = report.pid or None  # 0: it has ended already, or /proc cannot be read
                self._counted = report
                return
            if report.kind == lib.REPORT_FAILED:
                launcher.unmade(self.launcher, report)
        else:
            report = ffi.new("struct report *", {"kind": lib.REPORT_FAILED, "step": lib.STEP_REQUEST})
            if self.launcher.dies():
                self._lost = True
                launcher.lost(self.launcher)
        self._heard_ns = time.monotonic_ns()
        if self._exchange is not None:
            self._exchange.drain()
        self.reported = report

    def _receive(self) -> bytes | None:
        """One message, empty at the end; None when another thread has taken it. A command that the launcher no longer read shows as one
        reset, before what it had sent."""
        for _ in range(2):
            try:
                return self.channel.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                pass
        return b""

    def poll(self) -> Result | None:
        """The result if the run is over and its output is in the caller's files, else None. Does not wait."""
        with self.waiting():
            while not self.reported and ready([self.channel.fileno()], 0):
                self.hear()
        return self._finish() if self.reported and self._ends.carried(0) else None

    def wait(self, timeout: float | None = None) -> Result:
        """The result, without reading the pipes. Raises subprocess.TimeoutExpired after timeout seconds; the run goes on then."""
        deadline = deadline_of(timeout)
        self._hear_all(deadline, timeout)
        return self._finish_until(deadline, timeout)

    def _hear_all(self, deadline: float | None = None, timeout: float | None = None) -> None:
        with self.waiting():
            while not self.reported:
                rest = left(deadline)
                if ready([self.channel.fileno()], rest):
                    self.hear()
                elif rest == 0.0:
                    raise self.expired(timeout)

    def expired(self, timeout: float | None) -> Exception:
        """What says that the run was not over within timeout seconds, with what communicate has read meanwhile."""
        from subprocess import TimeoutExpired

        read = {} if self._exchange is None else self._exchange.output
        stdout, stderr = (bytes(read.get(name, b"")) or None for name in ("stdout", "stderr"))
        return TimeoutExpired(self.args, timeout or 0.0, stdout, stderr)

    def communicate(self, input: bytes | None = None, timeout: float | None = None) -> Result:
        """Feeds input, reads all output and gives the result with it. Raises subprocess.TimeoutExpired with what there was of it; it may be
        called again then, and loses nothing."""
        deadline = deadline_of(timeout)
        with self.waiting():
            self.exchange(input).run(timeout)
        return self._finish_until(deadline, timeout)

    def stream(self, input: bytes | None = None) -> Iterator[tuple[str, bytes]]:
        """Feeds input and gives the output as it comes: ("stdout" or "stderr", bytes), to the end of the run; `wait` has the result then,
        without what was given here. Beyond the policy's limit of output the run is ended, as in communicate."""
        with self.waiting():
            exchange = self.exchange(input)
            while not self.reported:
                exchange.wait(None)
                yield from exchange.taken()
        yield from exchange.taken()

    def exchange(self, input: bytes | None = None) -> Exchange:
        """The transfer of this run's streams, made on first use; when the run is over by then, what it left in the pipes."""
        with self.lock:
            if self._exchange is None:
                self._is_ours()
                self._exchange = Exchange(self, input)
                if self.reported:
                    self._exchange.drain()
                    self._result = None  # it has no output
            return self._exchange

    @property
    def outgoing(self) -> list[Carrier]:
        """What brings output to the caller's files; it may go on when the run is over."""
        return self._ends.outgoing

    def kill(self) -> None:
        """Ends the whole jail. Harmless when the run is over."""
        self._command(0, lib.CAUSE_CALLER)

    def terminate(self) -> None:
        """Sends SIGTERM to the program."""
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        """Sends a signal to the program itself, not to its children. Raises ValueError for a number that is none."""
        if number not in range(1, signal.NSIG):
            raise ValueError(f"{number} is not a valid signal")
        self._command(number, lib.CAUSE_NONE)

    def exceeded_output(self) -> None:
        """Ends the run because it wrote more than its policy lets it."""
        self._command(0, lib.CAUSE_OUTPUT)

    def _command(self, number: int, cause: int) -> None:
        command = ffi.new("struct command *", {"signal": number, "cause": cause})
        with contextlib.suppress(OSError), self.lock:  # or the channel's number might be another's by then
            self.channel.send(bytes(ffi.buffer(command)), socket.MSG_NOSIGNAL)

    def _finish_until(self, deadline: float | None, timeout: float | None) -> Result:
        if not self._ends.carried(left(deadline)):
            raise self.expired(timeout)
        return self._finish()

    def _finish(self) -> Result:
        self._ends.finish()
        with self.lock:
            if self._result is None:
                template, self.template = self.template, None
                if self._lost:
                    raise LauncherDied("the launcher ended in the middle of the run, and the jail with it; the next run starts a new one")
                try:
                    result = to_result(self.reported, self._context())
                except SetupError as error:
                    error.began |= any(carrier.to_program for carrier in self._ends.carriers)
                    if template is not None:
                        template.doubt()
                    raise
                self._result = result if self.page is None else structs.replace(result, audit=self.page.read())
            return self._result

    def _context(self) -> Context:
        done = self._exchange
        output, cut = (NO_OUTPUT, NOT_CUT) if done is None else (done.output, done.cut)
        return Context(
            self.compiled.policy,
            self.launcher.claim.mode,
            self.compiled.mounts,
            self.compiled.protections,
            bytes(output["stdout"]),
            bytes(output["stderr"]),
            cut["stdout"],
            cut["stderr"],
            begin_ns=self._begin_ns,
            heard_ns=self._heard_ns,
            file_cut=self._bound.exceeded,
            program=self.compiled.program,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Kills the run if it is still going on, and closes the pipes: in this order, or a program that writes would end by SIGPIPE."""
        try:
            if not self.reported and not self._inherited:
                self.kill()
                with contextlib.suppress(JailError):
                    self._hear_all()
                    if self._ends.carried(LINGER_S):
                        self._finish()
        finally:
            self._close_pipes()
