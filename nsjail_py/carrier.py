"""A caller's own file, carried through a pipe.

Where the program runs as the caller's user, a descriptor of his file is more than its bytes: its mode can be changed, and through
/proc/self/fd it can be opened again, for writing or without O_APPEND. So such a file stays outside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading

CHUNK = 1 << 18


def would_own(descriptor: int) -> bool:
    """Whether a program inside would be the owner of this file. Root gives each run a user of its own."""
    status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() != 0


class Carrier:
    """One stream of one run. `inside` is the program's end until `start`, from when on a thread copies to the end of either side."""

    def __init__(self, file: int, *, to_program: bool) -> None:
        self.to_program = to_program
        self.error: OSError | None = None
        read, write = os.pipe2(os.O_CLOEXEC)
        self.inside, pipe = (read, write) if to_program else (write, read)
        try:
            # The caller may close his as soon as the run has started.
            own = os.dup(file)
        except OSError:
            os.close(read)
            os.close(write)
            raise
        self._source, self._target = (own, pipe) if to_program else (pipe, own)
        self._thread = threading.Thread(target=self._carry, name="nsjail-carrier", daemon=True)

    def start(self) -> None:
        """When the run has its end of the pipe."""
        self._thread.start()

    def finish(self) -> None:
        """All that the program wrote is in the file now. Raises the OSError that kept it out, a full disk say."""
        if not self.to_program and self._thread.ident is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Instead of `start`."""
        os.close(self._source)
        os.close(self._target)

    def _carry(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
        try:
            with contextlib.suppress(BrokenPipeError):  # the program does not want the rest
                while data := os.read(self._source, CHUNK):
                    view = memoryview(data)
                    while view:
                        view = view[os.write(self._target, view) :]
        except OSError as error:
            self.error = error
        finally:
            self.close()
