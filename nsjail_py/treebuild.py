"""Making a minimal root: a tree is filled under another name and renamed when it is whole, so a killed builder leaves nothing that counts.

Separate from tree.py because most runs find the tree that they need.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import cachedir, elf, ldcache, tree
from .errors import PolicyError, SetupError

if TYPE_CHECKING:
    from .interpreter import Interpreter

FULL = {errno.ENOSPC, errno.EDQUOT}
NO_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def build(store: Path, path: Path, mountpoints: tuple[str, ...], fill: Callable[[Builder], None]) -> None:
    """Make the tree under another name, then rename it. Whoever builds the same meanwhile is welcome: the first one's stays."""
    try:
        with cachedir.filling(path) as work:
            builder = Builder(work)
            fill(builder)
            for name, text in tree.ETC.items():
                builder.write(f"/etc/{name}", text)
            builder.locale()
            for point in mountpoints:
                builder.mountpoint(point)
            for here, _, _ in os.walk(work):  # whatever the caller's umask is
                os.chmod(here, 0o755)
    except OSError as error:
        if not path.is_dir():  # else somebody was quicker
            raise _failed(error, path) from None


def _failed(error: OSError, path: Path) -> SetupError:
    advice = "make room there, or set NSJAIL_PY_CACHE to a directory with room" if error.errno in FULL else ""
    return SetupError("minimal root", error.errno or 0, str(error.filename or path), advice)


class Builder:
    """Copies files into a tree under the paths that they have on the host."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.links = tree.links()
        for name, text in self.links.items():
            (top / name).symlink_to(text)
            (top / text).mkdir(parents=True, exist_ok=True)

    def place(self, path: str) -> Path:
        """Where a path of the inside lies in the tree, its directory made; /lib and its like go where the host has them."""
        parts = os.path.normpath("/" + path.lstrip("/")).split("/")[1:]  # `..` must not leave the tree
        parts[0] = self.links.get(parts[0], parts[0])
        target = self.top.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def copy(self, source: str, path: str, *, named: bool = False) -> None:
        """A copy without owner, set-id bits or links. named: only because another file names it, so it is checked again once open."""
        target = self.place(path)
        if target.exists():
            return
        source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(source_fd)
            if not stat.S_ISREG(status.st_mode) or (named and not elf.may_show_open(source_fd)):
                raise PolicyError(f"{source}: changed while it was copied")
            target_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _copy_bytes(source_fd, target_fd)
                os.fchmod(target_fd, 0o755 if status.st_mode & 0o111 else 0o644)
                os.utime(target_fd, ns=(status.st_mtime_ns, status.st_mtime_ns))  # so that compiled modules stay valid
            finally:
                os.close(target_fd)
        finally:
            os.close(source_fd)

    def libraries(self, named: dict[str, str]) -> None:
        """Libraries, loaders and interpreters; what lies in a directory that is the jail's own could not be seen there, and stays out."""
        for source, path in named.items():
            if os.path.normpath(path).split("/")[1] not in tree.PRIVATE:
                self.copy(source, path, named=True)
        if cache := ldcache.of(elf.found_by_cache(named.values())):
            self.write("/etc/ld.so.cache", cache)

    def locale(self) -> None:
        for here, _, names in os.walk(tree.LOCALE):
            for name in names:
                self.copy(f"{here}/{name}", f"{here}/{name}")

    def compile(self, interpreter: Interpreter) -> None:
        """Modules that have no compiled form get one: inside, nobody could write it. Those that cannot be compiled stay as they are."""
        command = [interpreter.executable, "-I", "-S", "-m", "compileall", "-q", "-s", str(self.top)]
        places = {str(self.place(folder)) for folder in (*interpreter.stdlib, interpreter.site)}
        folders = [place for place in sorted(places) if os.path.isdir(place) and not any(place.startswith(f"{other}/") for other in places)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, *folders], stdin=subprocess.DEVNULL, capture_output=True, check=False, env={}, cwd="/", timeout=600)

    def write(self, path: str, text: str | bytes) -> None:
        target = self.place(path)
        target.write_bytes(text.encode() if isinstance(text, str) else text)
        target.chmod(0o644)

    def mountpoint(self, path: str) -> None:
        target = self.place(path)
        if path.endswith("/"):
            target.mkdir(exist_ok=True)
        elif not target.exists():
            target.touch()
            target.chmod(0o644)


def _copy_bytes(source: int, target: int) -> None:
    """The kernel copies, or shares the blocks where the file system can (copy_file_range(2))."""
    try:
        while os.copy_file_range(source, target, 1 << 30):
            pass
    except OSError as error:
        if error.errno not in NO_RANGE:
            raise
    while os.sendfile(target, source, None, 1 << 20):  # the rest, where it cannot: both go on from where they are
        pass
