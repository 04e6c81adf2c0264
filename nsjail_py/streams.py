"""A run's standard streams: which descriptors it gets, and the pipes in between while it goes on.

Output is bounded in memory whatever the program writes: beyond the policy's limit the run is ended, and the rest is dropped.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import time
import weakref
from collections.abc import Iterable, Iterator
from io import FileIO
from typing import IO, TYPE_CHECKING, Any

from .carrier import Bound, Carrier, stays_outside
from .errors import PolicyError, during

if TYPE_CHECKING:
    from .process import Process

PIPE, STDOUT, DEVNULL = -1, -2, -3
"""Those of subprocess, which is loaded late, since a command and most servers do not need it."""
Stream = int | IO[Any] | None
CHUNK = 65536
LONGEST_MS = 2**31 - 1
OF_A_RUN = frozenset({"input", "timeout", "stdin", "stdout", "stderr", "pass_fds"})
"""Options of `run` that are about one run; all others change the policy."""


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of one run, and changes to the policy."""
    return {k: v for k, v in options.items() if k in OF_A_RUN}, {k: v for k, v in options.items() if k not in OF_A_RUN}


def captured(input: bytes | None, streams: dict[str, Any]) -> dict[str, Any]:
    """The streams of a run whose output is kept unless they say otherwise. Raises ValueError where input has two sources."""
    if input is not None:
        if streams.get("stdin") is not None:
            raise ValueError("stdin and input cannot both be given")
        streams = {**streams, "stdin": PIPE}
    return {"stdout": PIPE, "stderr": PIPE, **streams}


def octets(data: bytes) -> memoryview:
    """The bytes of any buffer, as they lie in memory: a slice of it counts bytes, whatever its items are."""
    view = memoryview(data)
    plain = view.format == "B" and view.ndim == 1 and view.contiguous
    return view if plain else memoryview(view.tobytes())


def milliseconds(timeout: float | None) -> float | None:
    """For poll(2), which takes 24 days at most: whoever waits for longer asks again."""
    return None if timeout is None else min(max(0.0, timeout) * 1000, LONGEST_MS)


def deadline_of(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def left(deadline: float | None) -> float | None:
    """Seconds until then."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def ready(descriptors: Iterable[int], timeout: float | None) -> list[int]:
    """Those that can be read, or have been closed on the other side, within timeout seconds. Also of numbers that select(2) cannot take."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(milliseconds(timeout))]


def no_directory(descriptor: int) -> None:
    """A directory would open the host's files below it to the program: mounts are the way to show one."""
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise PolicyError(f"descriptor {descriptor} is a directory; show it with a mount instead")


class Ends:
    """The descriptors that go in, and our ends of the pipes among them. only_pipes: no descriptor of anything else goes in."""

    def __init__(self, stdin: Stream, stdout: Stream, stderr: Stream, *, only_pipes: bool = False) -> None:
        self.only_pipes = only_pipes
        self.inside: list[int] = []
        self.ours: list[int | None] = [None, None, None]
        self.opened: list[int] = []
        self.carriers: list[Carrier] = []
        try:
            with during("streams"):
                for number, stream in enumerate((stdin, stdout, stderr)):
                    self.inside.append(self._one(number, stream))
        except BaseException:
            self.close()
            raise

    def _one(self, number: int, stream: Stream) -> int:
        if stream is None or stream == DEVNULL:
            null = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if not self.only_pipes:
                return self._keep(null)
            try:
                return self._carried(number, null)
            finally:
                os.close(null)
        if stream == STDOUT:
            if number != 2:
                raise ValueError("STDOUT is for stderr only")
            if not self.only_pipes:
                return self.inside[1]
            # A description of its own: runsc takes one stream after the other over, makes it non-blocking for itself, and hands the
            # program what it finds then. A second stream on the same description would be non-blocking inside, too.
            return self._keep(os.open(f"/proc/self/fd/{self.inside[1]}", os.O_WRONLY))
        if stream == PIPE:
            read, write = os.pipe2(os.O_CLOEXEC)
            self.ours[number], theirs = (write, read) if number == 0 else (read, write)
            return self._keep(theirs)
        descriptor = stream if isinstance(stream, int) else stream.fileno()
        no_directory(descriptor)
        carried = self.only_pipes or stays_outside(descriptor, output=number > 0)
        return self._carried(number, descriptor) if carried else descriptor

    def _carried(self, number: int, descriptor: int) -> int:
        self.carriers.append(Carrier(descriptor, to_program=number == 0))
        return self._keep(self.carriers[-1].inside)

    def _keep(self, descriptor: int) -> int:
        self.opened.append(descriptor)
        return descriptor

    def files(self) -> list[IO[bytes] | None]:
        """Our ends as files, which own them from now on."""
        opened: list[IO[bytes] | None] = [
            None if fd is None else FileIO(fd, "wb" if number == 0 else "rb") for number, fd in enumerate(self.ours)
        ]
        self.ours = [None, None, None]
        return opened

    def sent(self, bound: Bound) -> None:
        """The run has them now; our copies would hide its end of file."""
        self._close_opened()
        for carrier in self.carriers:
            carrier.start(bound)

    @property
    def outgoing(self) -> list[Carrier]:
        return [carrier for carrier in self.carriers if not carrier.to_program]

    def carried(self, timeout: float | None) -> bool:
        """Whether all output is in the caller's files within timeout seconds. Where that is a pipe, its reader decides."""
        deadline = deadline_of(timeout)
        return all(carrier.carried(left(deadline)) for carrier in self.outgoing)

    def finish(self) -> None:
        """At the end of the run. Raises OSError where the output could not be written to the caller's file."""
        for carrier in self.carriers:
            carrier.finish()

    def _close_opened(self) -> None:
        for descriptor in self.opened:
            os.close(descriptor)
        self.opened = []

    def close(self) -> None:
        """Nothing was started."""
        self._close_opened()
        for carrier in self.carriers:
            carrier.close()
        for descriptor in self.ours:
            if descriptor is not None:
                os.close(descriptor)


class Exchange:
    """Feeds standard input, gathers output, and takes the report; `step(fd)` moves what a ready descriptor allows.

    One thread's poll loop (`run`) or an event loop's readers drive it alike.
    """

    def __init__(self, process: Process, data: bytes | None) -> None:
        self.process: Process = weakref.proxy(process)  # which has us: a handle that is dropped is to go at once
        self.limit = process.compiled.policy.limits.output
        self.input = octets(b"" if data is None else data)
        self.output = {"stdout": bytearray(), "stderr": bytearray()}
        """One buffer each: of a list of pieces every byte that is written alone would take thirty here."""
        self.cut = {"stdout": False, "stderr": False}
        self.count = 0
        self.looped = False
        """Whether an event loop drives it: a second one would take the first one's callbacks away."""
        self.streams = {file.fileno(): name for name in ("stdout", "stderr") if (file := getattr(process, name)) and not file.closed}
        for descriptor in self.streams:
            os.set_blocking(descriptor, False)
        if process.stdin is not None and not process.stdin.closed:
            os.set_blocking(process.stdin.fileno(), False)
            if not self.input:
                self._close_stdin()

    @property
    def wanted(self) -> dict[int, int]:
        """Descriptor -> poll events."""
        wanted = dict.fromkeys(self.streams, select.POLLIN)
        wanted[self.process.channel.fileno()] = select.POLLIN
        if self.process.stdin is not None and not self.process.stdin.closed:
            wanted[self.process.stdin.fileno()] = select.POLLOUT
        return wanted

    def step(self, descriptor: int) -> None:
        with self.process.lock:
            if descriptor in self.streams:
                self._read(descriptor)
            elif descriptor == self.process.channel.fileno():
                self.process.hear()
            else:
                self._write()

    def run(self, timeout: float | None) -> None:
        """Until the report is there. Raises subprocess.TimeoutExpired; the run goes on then, and so can the exchange."""
        deadline = deadline_of(timeout)
        while not self.process.reported:
            rest = left(deadline)
            self.wait(rest)
            if rest == 0.0 and not self.process.reported:  # a flood is always ready
                raise self.process.expired(timeout)

    def wait(self, timeout: float | None) -> bool:
        """Moves what can be moved, waiting for it up to timeout seconds; false when there was nothing."""
        poll = select.poll()
        with self.process.lock:
            for descriptor, events in self.wanted.items():
                poll.register(descriptor, events)
        ready = poll.poll(milliseconds(timeout))
        for descriptor, _ in ready:
            self.step(descriptor)
        return bool(ready)

    def taken(self) -> Iterator[tuple[str, bytes]]:
        """What has come since, each stream's in order; it is not kept any more."""
        for name, data in self.output.items():
            self.output[name] = bytearray()
            if data:
                yield name, bytes(data)

    def _write(self) -> None:
        stdin = self.process.stdin
        if stdin is None or stdin.closed:
            return
        try:
            self.input = self.input[os.write(stdin.fileno(), self.input[:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it does not want the rest
            self.input = memoryview(b"")
        if not self.input:
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def _read(self, descriptor: int) -> bool:
        """Whether there may be more."""
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self.streams.pop(descriptor, None)
            return False
        name = self.streams[descriptor]
        room = len(data) if self.limit is None else max(0, self.limit - self.count)
        self.count += len(data)
        if room:
            self.output[name] += data[:room]
        if len(data) > room:
            if not any(self.cut.values()):
                self.process.exceeded_output()
            self.cut[name] = True
        return True

    def drain(self) -> None:
        """What was written before the end. A descriptor that outlives the run somewhere is not waited for."""
        for descriptor in list(self.streams):
            while self._read(descriptor):
                pass
        self.streams = {}
