"""The command's streams, carried between the caller's and the jail's: unchanged, as they come, all three at once.

The program never gets a descriptor of the caller. A terminal could be typed into; and through /proc/self/fd a program of the same user
opens a file or a pipe again, for writing: the script that a shell goes on to read from, say. So everything is copied through our own pipes.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from .result import Result, Verdict

if TYPE_CHECKING:
    from .process import Process

CHUNK = 65536
STANDARD = {1: "standard output", 2: "standard error"}
Sink = Callable[[bytes], object]
"""Takes a piece of output. Raises BrokenPipeError when nobody wants more."""


class Relay:
    """Carries the streams of one run to its end. `limit`: bytes of both outputs together; beyond it the run is ended."""

    def __init__(self, process: Process, source: int, stdout: Sink, stderr: Sink, limit: int | None) -> None:
        assert process.stdin is not None, "started with three pipes"
        assert process.stdout is not None, "started with three pipes"
        assert process.stderr is not None, "started with three pipes"
        self.process = process
        self.stdin, self.source, self.pending = process.stdin, source, memoryview(b"")
        self.outputs = {process.stdout.fileno(): (process.stdout, stdout), process.stderr.fileno(): (process.stderr, stderr)}
        self.limit, self.count = limit, 0
        for descriptor in (self.stdin.fileno(), *self.outputs):
            os.set_blocking(descriptor, False)

    def run(self) -> Result:
        """The run's result. A program that closes its outputs and goes on is still waited for, and one that leaves them open is not."""
        while not self.process.reported:
            for descriptor, event in self._poll():
                self._step(descriptor, event)
        for descriptor in list(self.outputs):
            while self._read(descriptor):
                pass
        result = self.process.wait()
        if self.limit is not None and self.count > self.limit and not result.verdict.is_limit:
            # It ended by itself before the order to end it came.
            return replace(result, verdict=Verdict.output, evidence={"limit": self.limit})
        return result

    def _poll(self) -> list[tuple[int, int]]:
        poll = select.poll()
        for descriptor in (*self.outputs, self.process.channel.fileno()):
            poll.register(descriptor, select.POLLIN)
        if not self.stdin.closed:
            # Even with nothing to write: an error means that the program does not read any more.
            poll.register(self.stdin, select.POLLOUT if self.pending else 0)
            if not self.pending:
                poll.register(self.source, select.POLLIN)
        return poll.poll()

    def _step(self, descriptor: int, event: int) -> None:
        if descriptor in self.outputs:
            self._read(descriptor)
        elif descriptor == self.process.channel.fileno():
            self.process.hear()
        elif self.stdin.closed:
            pass
        elif descriptor == self.source:
            self._fetch()
        elif event & select.POLLERR:
            self.stdin.close()
        else:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                self.pending = self.pending[os.write(descriptor, self.pending) :]

    def _fetch(self) -> None:
        try:
            self.pending = memoryview(os.read(self.source, CHUNK))
        except BlockingIOError:
            return
        except OSError:  # opened for writing only; a terminal that has gone
            self.pending = memoryview(b"")
        if not self.pending:
            self.stdin.close()

    def _read(self, descriptor: int) -> bool:
        """Whether there may be more."""
        file, sink = self.outputs[descriptor]
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return False
        room = len(data) if self.limit is None else max(0, self.limit - self.count)
        if len(data) > room and self.limit is not None and self.count <= self.limit:
            self.process.exceeded_output()  # once: an order that nobody reads any more would take the place of the report
        self.count += len(data)
        try:
            if data:
                sink(data[:room])
        except BrokenPipeError:
            data = b""
        if not data:
            del self.outputs[descriptor]
            file.close()  # if it goes on writing there, it gets SIGPIPE, as without a jail
        return bool(data)


def writer(descriptor: int, name: str = "") -> Sink:
    """Writes to a descriptor of the caller, which may be one that does not wait. Errors have its name."""
    name = name or STANDARD[descriptor]

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(descriptor, select.POLLOUT)
                poll.poll()
            except OSError as error:
                raise OSError(error.errno, error.strerror, name) from None

    return write
