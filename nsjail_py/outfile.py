"""A file of the caller's that a command writes at its end. It is opened before the run, since afterwards it is too late to fail. Until
there is something to write it is what it was, and nothing is ever put in its place: it may be a pipe, a device, or a link to one."""

from __future__ import annotations

import os
import stat
from types import TracebackType
from typing import Self

from .relay import writer


class Output:
    """Raises OSError, with the file's name, when it cannot be opened or written. One that was made for nothing is removed."""

    def __init__(self, path: str) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        try:
            self.descriptor, self.is_new = os.open(path, flags | os.O_EXCL, 0o666), True
        except FileExistsError:
            self.descriptor, self.is_new = os.open(path, flags), False
        found = os.fstat(self.descriptor)
        self.is_replaced = stat.S_ISREG(found.st_mode)
        for number in (1, 2):
            if os.path.samestat(found, os.fstat(number)):  # /dev/stdout: behind what the program has written there, and not over it
                os.dup2(number, self.descriptor, inheritable=False)
                self.is_replaced = False

    def write(self, text: bytes) -> None:
        """All that is to be in it."""
        self.is_new = False
        if self.is_replaced:
            os.truncate(self.descriptor, 0)
        writer(self.descriptor, self.path)(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self.descriptor)
        if self.is_new:
            os.unlink(self.path)
