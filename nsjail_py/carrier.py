"""A caller's own file, carried through a pipe.

A descriptor is more than what is written to it. Whoever has it can move where the caller goes on writing, take O_APPEND from it, and cut
the file off; where the program runs as the caller's user, it can also change the file's mode, and open it again through /proc/self/fd. So
a file that takes output stays outside, and one that gives input where the program would own it. And an OCI runtime gives what it is passed
to the container's user, be it /dev/null: it is passed pipes only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import stat
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import SetupError

if TYPE_CHECKING:
    from .process import Process

CHUNK = 1 << 18
TOLD_MS = 1000
"""How long a program may take to die of SIGXFSZ. One that ignores it finds its pipe closed after that."""


def stays_outside(descriptor: int, *, output: bool) -> bool:
    """Whether it is a file that no program is given. Root gives each run a user of its own, who owns no file of the caller's."""
    status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and (output or status.st_uid == os.geteuid() != 0)


class Bound:
    """How large a run may make the files that are carried for it: RLIMIT_FSIZE, which does not hold for a pipe. A program that goes beyond
    gets SIGXFSZ, as it would of a file of its own, and the file has what there was room for."""

    def __init__(self, size: int | None, process: Process) -> None:
        self.size = size
        self.exceeded = False
        self._process: Process = weakref.proxy(process)  # a handle that is dropped is to go at once
        self._writing = threading.Lock()
        """Two streams may be one file."""

    def write(self, target: int, data: bytes) -> bool:
        """False where it does not fit, and the program has been told."""
        if self.size is None or not stat.S_ISREG(os.fstat(target).st_mode):
            _write(target, data)
            return True
        with self._writing:
            appends = fcntl.fcntl(target, fcntl.F_GETFL) & os.O_APPEND
            room = max(0, self.size - (os.fstat(target).st_size if appends else os.lseek(target, 0, os.SEEK_CUR)))
            _write(target, data[:room])
        if len(data) <= room:
            return True
        self.exceeded = True
        with contextlib.suppress(ReferenceError):
            self._process.send_signal(signal.SIGXFSZ)
        return False


def _write(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


class Carrier:
    """One stream of one run. `inside` is the program's end; from `start` on a thread copies to the end of either side.

    Raises SetupError where no thread can be had, and OSError where no descriptor can.
    """

    def __init__(self, file: int, *, to_program: bool) -> None:
        self.to_program = to_program
        self.error: OSError | None = None
        self.over = False
        """Nothing is carried any more."""
        self._tell: list[Callable[[], object]] = []
        self._decided = threading.Event()
        self._bound: Bound | None = None
        read, write = os.pipe2(os.O_CLOEXEC)
        self.inside, pipe = (read, write) if to_program else (write, read)
        opened = [read, write]
        try:
            # The caller may close his as soon as the run has started.
            opened.append(own := os.dup(file))
            self._source, self._target = (own, pipe) if to_program else (pipe, own)
            self._held = [self._source, self._target]
            self._thread = threading.Thread(target=self._carry, name="nsjail-carrier", daemon=True)
            self._thread.start()
        except BaseException as error:
            for descriptor in opened:
                os.close(descriptor)
            if isinstance(error, RuntimeError):
                raise SetupError("streams", errno.EAGAIN, str(error), "raise the limit of threads (ulimit -u), or end some") from None
            raise

    def start(self, bound: Bound) -> None:
        """When the run has its end of the pipe."""
        self._bound = bound
        self._decided.set()

    def close(self) -> None:
        """Instead of `start`."""
        self._decided.set()

    def carried(self, timeout: float | None) -> bool:
        """Whether all that the program wrote is in the file, or cannot be, within timeout seconds."""
        self._thread.join(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        return not self._thread.is_alive()

    def when_over(self, tell: Callable[[], object]) -> None:
        """Calls it from some thread when `over` is true; perhaps twice."""
        self._tell.append(tell)
        if self.over:
            tell()

    def finish(self) -> None:
        """All that the program wrote is in the file now. Raises the OSError that kept it out, a full disk say."""
        if not self.to_program:
            self.carried(None)
        if self.error is not None:
            raise self.error

    def _carry(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
        self._decided.wait()
        try:
            while self._bound and self._has_more() and (data := os.read(self._source, CHUNK)):
                if not self._bound.write(self._target, data):
                    (told := select.poll()).register(self._source, 0)
                    told.poll(TOLD_MS)
                    break
        except BrokenPipeError:
            pass  # the program does not want the rest
        except OSError as error:
            self.error = error
        finally:
            self.let_go()
            for tell in self._tell:
                tell()

    def let_go(self) -> None:
        """Closes what is ours: at the end, or in a forked child, whose copy of a pipe would hide its end. One number after the other, since
        the fork may come in the middle."""
        while self._held:
            try:
                os.close(self._held.pop(0))
            except OSError as error:  # a file on another machine may be found full only now
                self.error = self.error or error
        self.over = True

    def _has_more(self) -> bool:
        """Waits for something to read; false when the program has closed its end, and the rest is the next reader's."""
        poll = select.poll()
        poll.register(self._source, select.POLLIN)
        if self.to_program:
            poll.register(self._target, 0)
        return all(descriptor != self._target for descriptor, _ in poll.poll())
