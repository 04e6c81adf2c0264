"""`Session`: one jailed interpreter for many cells of code, each with its own limits and result; and the way back after a wrong one.

    with Jail("untrusted", preload=["numpy"]).session() as s:
        s.run("x = 1")
        s.checkpoint()
        s.run("del x")
        s.restore()
        s.run("x").value        # '1'

A session is one run. What it says about itself (a value, a traceback, times) is said by code that nobody trusts; that it is inside, and
ends when it should, is the kernel's and ours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import math
import operator
import os
import select
import signal
import socket
import subprocess
import termios
import threading
import time
from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import msgspec
from msgspec.structs import replace

from . import launcher
from .errors import JailError, JobError, PolicyError, SessionError
from .oneline import one_line
from .prepared import prepared
from .result import Result, Verdict
from .session_inside import CALLER, COUNT, MOST_FIGURES
from .streams import CHUNK, DEVNULL, PIPE
from .units import MAX_TIME
from .unpack import decode_json

if TYPE_CHECKING:
    from .jail import Jail
    from .policy import Policy

PRELOAD = ("json", "select", "signal", "socket", "stat", "traceback", "typing", "linecache", "contextlib", "time", "warnings")
"""What session_inside.py imports."""
MOST_HEAD, MOST_DATA = 20 << 20, 64 << 20
"""Bytes: of three texts (MOST_TEXT inside), each of them six times longer in JSON; of a file."""
MOST_ERRNO = 4095
GRACE = 1.0
"""Seconds after a wall time limit for the keeper inside to end the cell. Then the whole session ends."""
LONG = 1 << 30
"""Milliseconds, which poll(2) can still take."""
PATIENCE, PACE = 30.0, 8 << 20
"""Seconds for any other answer, and bytes in each second more: the tenant's code can stop the keeper."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What one cell of a session came to."""

    verdict: Verdict
    """`ok`; `exit` for an exception; a limit or `signal` for what ended the session's process. `memory` also where another process was
    killed for it: `checkpoints` of the evidence are those that are gone."""
    evidence: dict[str, Any]
    value: str | None = None
    """repr of the last statement's value, where that is an expression, and not None."""
    error: tuple[str, str, str] | None = None
    """Of an exception: its type's name, its message, and its traceback as text."""
    stdout: bytes = b""
    stderr: bytes = b""
    figures: tuple[bytes, ...] = ()
    """matplotlib's figures that the cell left open, as PNG; up to the first that could not be drawn, which is the cell's error."""
    wall_time: float = 0.0
    """Seconds, as the session says."""
    cpu_time: float = 0.0
    """Seconds of processor time of the session's own process, as it says."""

    @property
    def ok(self) -> bool:
        return self.verdict is Verdict.ok

    def check(self) -> Self:
        """Itself when it is ok. Raises JobError for an exception inside, and SessionError for a limit or an end of the interpreter."""
        if self.error is not None:
            raise JobError(*self.error)
        if not self.ok:
            raise SessionError(f"the cell came to {self.verdict} {self.evidence}")
        return self


def policy_for(policy: Policy) -> Policy:
    """The jail's policy for its sessions: its time limits are each cell's; they may fork, which a checkpoint is; exec stays as it was.
    Raises PolicyError where the policy leaves out what a session itself imports."""
    lacking = [name for name in PRELOAD if name in policy.python.without]
    if lacking:
        raise PolicyError(f"$.python.without: a session itself imports {', '.join(lacking)}")
    limits = replace(policy.limits, wall_time=None, cpu_time=None, idle_time=None)
    syscalls = policy.syscalls and replace(policy.syscalls, allow=(*policy.syscalls.allow, "@processes"))
    python = policy.python
    if not python.whole:
        python = replace(python, imports=(*python.imports, *PRELOAD))
    return replace(policy, limits=limits, syscalls=syscalls, python=python, env={"MPLBACKEND": "Agg"} | policy.env)


def inner_jail(jail: Jail) -> Jail:
    from .jail import Jail

    preload = None if jail.preload is None else (*jail.preload, *PRELOAD)
    return Jail(policy_for(jail.policy), stock=jail.stock, preload=preload)


class Session:
    """Made by Jail.session. From any thread; one cell at a time.

    A cell that meets a limit, or ends the interpreter, takes the state with it: `run` raises SessionError from then on, until `restore`
    goes back to a checkpoint. `result` is there when the session has ended.
    """

    def __init__(self, jail: Jail, policy: Policy, lifetime: float | None) -> None:
        if lifetime is not None and not (isinstance(lifetime, (int, float)) and 0 < lifetime <= MAX_TIME):
            raise PolicyError(f"lifetime = {lifetime!r}: more than 0 seconds, and at most {MAX_TIME}; None for no limit")
        self.result: Result | None = None
        self._policy, self._limits = policy, policy.limits
        self._lock = threading.RLock()  # a call that fails closes
        self._inherited = False
        self._cells = self._commands = self._memory_killed = 0
        self._failure: JailError | None = None
        """In the place of a result."""
        self._gone: str | None = None
        """Why there is no state at the moment."""
        self._socket, theirs = launcher.pair(socket.SOCK_STREAM)
        with theirs:
            try:
                self._process = jail.start_own("session", {CALLER: theirs.fileno()}, (DEVNULL, PIPE, PIPE), lifetime)
            except BaseException:
                self._socket.close()
                raise
        assert self._process.stdout is not None, "started with pipes"
        assert self._process.stderr is not None, "started with pipes"
        self._outputs = {self._process.stdout.fileno(): "stdout", self._process.stderr.fileno(): "stderr"}
        for descriptor in self._outputs:
            os.set_blocking(descriptor, False)
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self._size, self._stopped = 0, False
        self._asked = True
        """Whether an answer is on its way."""
        launcher.inheritable.add(self)
        try:
            with self._whole():
                self._receive(PATIENCE)
        except SessionError as error:
            if self._failure is not None:  # nothing has run yet
                raise self._failure from None
            last = self._output["stderr"].decode(errors="replace").strip().rpartition("\n")[2]
            raise SessionError(f"{error}{f' ({one_line(last)})' if last else ''}") from None

    def inherited(self) -> None:
        """In a forked child: the session goes on in the parent. The launcher's module has closed our copy of its socket."""
        self._inherited, self._lock = True, threading.RLock()

    def run(self, code: str, *, wall_time: float | None = None, cpu_time: float | None = None) -> Cell:
        """Runs one cell. Limits in seconds; those of the policy where none are given.

        Raises SessionError when there is no state to run it in, ScriptRefused where the policy lets the scan refuse one, and ValueError
        for a limit that is none and text that is not Unicode.
        """
        wall = _seconds(self._limits.wall_time if wall_time is None else wall_time)
        cpu = _seconds(self._limits.cpu_time if cpu_time is None else cpu_time)
        source = code.encode()
        with self._lock, self._whole():
            self._need_state()
            self._cells += 1
            head = {"do": "run", "name": f"<cell {self._cells}>", "wall_time": wall, "cpu_time": cpu}
            if self._policy.python.scan != "off":
                from .layers.scan import before_run

                before_run(self._policy, source, f"<cell {self._cells}>")
            self._output, self._size, self._stopped = {"stdout": bytearray(), "stderr": bytearray()}, 0, False
            answer, data = self._ask(head, None if wall is None else wall + GRACE, source)
            self._drain()
            return self._cell(answer, data, {"wall_time": wall, "cpu_time": cpu})

    def checkpoint(self) -> int:
        """Keeps the state as it is, and gives its number. It costs a process and what later cells change. Files are not kept.

        Raises SessionError where the limit on processes is reached, and where the state has threads, which no fork carries over.
        """
        with self._lock, self._whole():
            self._need_state()
            answer, _ = self._ask({"do": "checkpoint"}, PATIENCE)
            if answer.died:
                self._death(answer, {}, self._memory_kills())
            self._need_state()
            self._forked(answer)
            return answer.id

    def restore(self, number: int = -1) -> None:
        """Goes back to a checkpoint, by default the last one, as often as wanted. What cells have left running is ended. Raises
        SessionError where there is none such."""
        with self._lock, self._whole():
            answer, _ = self._ask({"do": "restore", "id": operator.index(number)}, PATIENCE)
            if answer.unknown:
                raise SessionError("there is no checkpoint" if number == -1 else f"there is no checkpoint {number}")
            if answer.died:
                raise SessionError(f"checkpoint {number} has ended")
            self._forked(answer)

    def put(self, path: str | os.PathLike[str], data: bytes) -> None:
        """Writes a file inside, of at most 64 MiB; a path without a slash at its start lies in /work. Raises OSError and ValueError as open
        does, and for what is more than the policy's memory, where files in /work count."""
        name, data = _name(path), memoryview(data).tobytes()
        most = min(MOST_DATA, self._limits.memory or MOST_DATA)
        if len(data) > most:
            raise ValueError(f"{len(data)} bytes: at most {most}")
        with self._lock, self._whole():
            answer, _ = self._ask({"do": "put", "path": name}, PATIENCE, data)
            self._refused(answer, name)

    def get(self, path: str | os.PathLike[str]) -> bytes:
        """Reads a file inside, of at most 64 MiB. Raises OSError and ValueError as open does."""
        name = _name(path)
        with self._lock, self._whole():
            deadline, parts = _within(MOST_DATA), bytearray()
            answer, data = self._ask({"do": "get", "path": name, "most": MOST_DATA}, PATIENCE)
            while answer.more:
                parts += data
                if len(parts) > MOST_DATA:
                    raise _Broken("what it says makes no sense")
                answer, data = self._receive(deadline - time.monotonic())
            self._refused(answer, name)
            return bytes(parts)

    def interrupt(self) -> None:
        """KeyboardInterrupt for the cell that runs, from another thread."""
        self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """Ends the session and everything in it. In a thread that waits for a cell `run` raises SessionError then. In a fork of the process
        that started it: nothing."""
        if self._inherited:
            return
        self._process.kill()
        with self._lock:  # that thread hears of it
            self._socket.close()
            self._process.__exit__(None, None, None)
            if self.result is None:
                try:
                    self.result = self._process.wait()
                except JailError as error:
                    self._failure = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- messages

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """A message that was only half sent or read would be taken for another: so that is the end."""
        if self._inherited:
            raise SessionError("the session belongs to the process that started it, and this is a fork of that")
        if self._socket.fileno() < 0:
            raise SessionError(f"the session has ended: {self._said()}")
        try:
            yield
        except _Broken as error:
            if isinstance(error, _LetGo):  # to kill it now would hide what it ended with
                with contextlib.suppress(JailError, subprocess.TimeoutExpired):
                    self._process.wait(PATIENCE)
            self._drain()
            self.close()
            raise SessionError(f"the session has ended: {error}; {self._said()}") from self._failure
        except BaseException:
            if self._asked:
                self.close()
            raise

    def _said(self) -> str:
        return self.result.summary if self.result is not None else str(self._failure)

    def _need_state(self) -> None:
        if self._gone is not None:
            raise SessionError(f"the session's state is gone ({self._gone}): restore a checkpoint, or begin anew")

    def _forked(self, answer: _Answer) -> None:
        """Raises SessionError where it has not."""
        if answer.threads:
            raise SessionError(f"a checkpoint has no threads, and the state has {answer.threads} beside its main one: end them first")
        if answer.errno == errno.EAGAIN:
            most = self._limits.processes
            raise SessionError(f"no process is left for it (limits.processes = {most}): each checkpoint keeps one")
        if answer.errno:
            raise SessionError(f"there is no room for it: {os.strerror(answer.errno)}")

    @staticmethod
    def _refused(answer: _Answer, path: str) -> None:
        if answer.errno:
            raise OSError(answer.errno, os.strerror(answer.errno), path)

    def _ask(self, head: dict[str, Any], most: float | None, data: bytes = b"") -> tuple[_Answer, bytes]:
        """most: seconds until the answer begins."""
        self._commands += 1
        self._send(head | {"number": self._commands}, data)
        answer, data = self._receive(most)
        self._gone = (self._gone or "its process has ended") if answer.gone else None
        return answer, data

    def _send(self, head: dict[str, Any], data: bytes = b"") -> None:
        text = msgspec.json.encode(head)
        rest = memoryview(len(text).to_bytes(COUNT, "little") + len(data).to_bytes(COUNT, "little") + text + data)
        self._asked = True
        deadline = _within(len(rest))
        while rest:
            self._wait(select.POLLOUT, deadline)
            try:
                rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except OSError as error:
                raise _LetGo(str(error)) from None

    def _receive(self, most: float | None) -> tuple[_Answer, bytes]:
        until = None if most is None else time.monotonic() + most
        lengths = self._read(2 * COUNT, until)
        head, data = int.from_bytes(lengths[:COUNT], "little"), int.from_bytes(lengths[COUNT:], "little")
        if head > MOST_HEAD or data > MOST_FIGURES:
            raise _Broken("what it says makes no sense")
        deadline = _within(head + data) if until is None else until + (head + data) / PACE  # an answer that has begun buys no patience
        try:
            answer = decode_json(self._read(head, deadline), _Answer)
        except ValueError:
            raise _Broken("what it says makes no sense") from None
        if answer.number != self._commands:
            raise _Broken("what it says answers another command")
        result = self._read(data, deadline)
        self._asked = answer.more
        return answer, result

    def _read(self, size: int, deadline: float | None) -> bytes:
        parts: list[bytes] = []
        while size:
            self._wait(select.POLLIN, deadline)
            try:
                part = self._socket.recv(min(size, 1 << 20), socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _LetGo(str(error)) from None
            if not part:
                raise _LetGo("it has let go")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, event: int, deadline: float | None) -> None:
        """Until the socket is ready; meanwhile takes the output. Raises _Broken when the run is over or the time is up."""
        while True:
            rest = None if deadline is None else (deadline - time.monotonic()) * 1000
            if rest is not None and rest <= 0:  # by the clock: output can be ready at all times
                raise _Broken("it did not answer in time")
            poll = select.poll()
            poll.register(self._socket, event)
            poll.register(self._process.channel, select.POLLIN)
            for descriptor in self._outputs:
                poll.register(descriptor, select.POLLIN)
            ready = dict(poll.poll(None if rest is None else min(rest, LONG)))
            for descriptor in ready.keys() & self._outputs.keys():
                self._take(descriptor)
            if event == select.POLLIN:  # between two messages of ours
                self._stop_flood()
            if self._socket.fileno() in ready:
                return
            if self._process.channel.fileno() in ready and self._process.hear():
                raise _LetGo("its run is over")

    def _stop_flood(self) -> None:
        """Once; a keeper that is not in a cell any more passes it over."""
        if not self._stopped and self._limits.output is not None and self._size > self._limits.output:
            self._stopped = True
            self._send({"do": "stop", "why": "output"})

    def _take(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:  # the user's code can read it, too
            return
        if not data:
            self._outputs.pop(descriptor, None)
            return
        most = self._limits.output
        room = len(data) if most is None else max(0, most - self._size)
        self._size += len(data)
        self._output[self._outputs[descriptor]] += data[:room]

    def _drain(self) -> None:
        """What was written before the answer, and not what a thread of the cell's goes on writing."""
        for descriptor in list(self._outputs):
            waiting = array("i", [0])
            fcntl.ioctl(descriptor, termios.FIONREAD, waiting)
            for _ in range(0, waiting[0], CHUNK):
                self._take(descriptor)

    def _cell(self, answer: _Answer, data: bytes, limits: dict[str, float | None]) -> Cell:
        if answer.errno:
            raise _Broken("what it says makes no sense")
        stdout, stderr = (bytes(self._output[name]) for name in ("stdout", "stderr"))
        memory = self._memory_kills()
        if answer.died:
            verdict, evidence = self._death(answer, limits, memory)
            return Cell(verdict=verdict, evidence=evidence, stdout=stdout, stderr=stderr, wall_time=answer.wall, cpu_time=answer.cpu)
        ends = list(itertools.accumulate(answer.figures, initial=0))
        verdict, evidence = Verdict.ok, dict[str, Any]()
        if memory:
            verdict, evidence = Verdict.memory, memory
        elif answer.error is not None:
            verdict, evidence = Verdict.exit, {"exception": answer.error[0]}
        elif self._limits.output is not None and self._size > self._limits.output:
            verdict, evidence = Verdict.output, {"limit": self._limits.output}
        return Cell(
            verdict=verdict,
            evidence=evidence,
            value=answer.value,
            error=answer.error,
            figures=tuple(data[begin:end] for begin, end in itertools.pairwise(ends)),
            wall_time=answer.wall,
            cpu_time=answer.cpu,
            stdout=stdout,
            stderr=stderr,
        )

    def _memory_kills(self) -> dict[str, Any]:
        """What the kernel has killed for want of memory since this was asked last: as the launcher says; but which checkpoints are lost by
        it, the session."""
        report, before = self._process.counted(), self._memory_killed
        self._memory_killed = report.oom_kills
        if report.oom_kills <= before:
            return {}
        lost = self._ask({"do": "lost"}, PATIENCE)[0].lost
        killed = {"limit": self._limits.memory, "observed": report.peak_memory, "oom_kills": report.oom_kills - before}
        return killed | ({"checkpoints": lost} if lost else {})

    def _death(self, answer: _Answer, limits: dict[str, float | None], memory: dict[str, Any]) -> tuple[Verdict, dict[str, Any]]:
        """What has ended the state."""
        verdict, evidence = Verdict.exit, dict[str, Any]()
        if answer.died == "output":
            verdict, evidence = Verdict.output, {"limit": self._limits.output}
        elif answer.died in limits:
            observed = answer.wall if answer.died == "wall_time" else answer.cpu
            verdict, evidence = Verdict(answer.died), {"limit": limits[answer.died], "observed": observed}
        elif memory:
            verdict, evidence = Verdict.memory, memory
        elif answer.died == "closed":
            evidence = {"closed": "the socket on which the session answers"}
        elif os.WIFSIGNALED(answer.status):
            verdict, evidence = Verdict.signal, {"signal": os.WTERMSIG(answer.status)}
        else:
            evidence = {"exit_code": os.waitstatus_to_exitcode(answer.status)}
        self._gone = f"{verdict} {evidence}"
        return verdict, evidence


def _seconds(limit: float | None) -> float | None:
    if limit is not None and not 0 <= limit < math.inf:
        raise ValueError(f"a limit of {limit} seconds")
    return limit if limit is None else float(limit)


def _name(path: str | os.PathLike[str]) -> str:
    name = os.fsdecode(path)
    if b"\0" in name.encode():
        raise ValueError("embedded null byte")
    return name


def _within(size: int) -> float:
    """The deadline of a message's bytes."""
    return time.monotonic() + PATIENCE + size / PACE


@prepared
class _Answer(msgspec.Struct):
    """All that an answer of the keeper's can say. The tenant's code can say it as well: this is where it is checked."""

    number: int = 0
    """Of the command that it answers."""
    more: bool = False
    """Another answer to the same follows."""
    errno: Annotated[int, msgspec.Meta(ge=0, le=MOST_ERRNO)] = 0
    gone: bool = False
    threads: Annotated[int, msgspec.Meta(ge=0, le=1 << 22)] = 0
    unknown: bool = False
    id: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)] = 0
    died: Literal["ended", "closed", "output", "wall_time", "cpu_time"] | None = None
    lost: Annotated[list[int], msgspec.Meta(max_length=1 << 16)] = []
    status: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)] = 0
    value: str | None = None
    error: tuple[str, str, str] | None = None
    wall: float = 0.0
    cpu: float = 0.0
    figures: list[Annotated[int, msgspec.Meta(ge=0, le=MOST_FIGURES)]] = []

    def __post_init__(self) -> None:
        """Raises ValueError for a status that is no end."""
        os.waitstatus_to_exitcode(self.status)


class _Broken(SessionError):
    """The session cannot go on."""


class _LetGo(_Broken):
    """Its run is over, or just ending by itself."""
