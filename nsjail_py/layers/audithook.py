"""An audit hook (PEP 578) written in Python, as applications have it. For comparison in the layers' report.

What it cannot do: what raises no event (reading a variable of the environment), what C code does by itself, and anything against code that
takes the hook apart. Its source runs alone; it stays away from the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

REFUSED = (
    *("os.", "subprocess.", "ctypes.", "socket.", "shutil.", "pty.", "sqlite3.", "gc.", "fcntl.", "mmap.", "resource.", "signal."),
    *("pickle.find_class", "code.__new__", "cpython.PyInterpreterState_New", "sys.settrace", "sys.setprofile", "sys._current_frames"),
    *("sys.addaudithook", "urllib.", "http.client", "ftplib.", "smtplib.", "webbrowser.", "builtins.input", "sys.unraisablehook"),
)
"""Events, or their beginnings."""
HARMLESS = frozenset({"os.listdir", "os.scandir", "os.fwalk", "os.walk", "gc.get_count"})
"""The import system lists directories."""
FRAMES = frozenset({"gi_frame", "gi_code", "cr_frame", "cr_code", "ag_frame", "ag_code"})
MODULES = {
    *("ctypes", "_ctypes", "cffi", "subprocess", "_posixsubprocess", "pty", "multiprocessing", "socket", "_socket", "mmap", "gc"),
    *("pickle", "_pickle", "marshal", "sqlite3", "runpy", "zipimport", "_interpreters", "_xxsubinterpreters"),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class AuditHook:
    """Refuses events by raising. Once added it stays until the process ends."""

    def __init__(self, allowed: Iterable[str], directories: Iterable[str]) -> None:
        self.allowed = frozenset(allowed)
        self.directories = tuple(os.path.realpath(one) + "/" for one in directories)
        self.readable = tuple({os.path.realpath(place) + "/" for place in (sys.base_prefix, sys.prefix, *sys.path) if place})

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            self.check_open(*args)
        elif event == "import":
            top = str(args[0]).partition(".")[0]
            if top in MODULES or not (top in self.allowed or top in sys.stdlib_module_names):
                raise ImportError(f"import of {top!r} is refused")
        elif event == "object.__getattr__":
            if args[1] in FRAMES:
                raise AttributeError(f"{args[1]} is refused")
        elif event.startswith(REFUSED) and event not in HARMLESS:
            raise PermissionError(f"{event} is refused")

    def check_open(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path))
        writing = bool((flags or 0) & WRITING)
        if not real.startswith(self.directories if writing else self.directories + self.readable):
            raise PermissionError(f"open of {real!r} is refused")
