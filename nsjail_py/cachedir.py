"""Where built roots and compiled filters are kept: a directory that only its owner can change.

What is used is marked by its time of change, when it is looked up and from then on once an hour. What has had no mark for a week, and is
mounted nowhere, is removed when something new is built.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import SetupError

UNUSED = 7 * 86400.0
"""Seconds without a mark after which an entry goes."""
STALE = 60.0
"""Seconds after which something unfinished that nobody holds locked is rubbish."""
AGAIN = 3600.0
"""Seconds after which a process marks what it goes on using."""
EXECUTED = ("roots", "images")
"""Kinds of things whose programs are executed where they are kept."""
_marked: dict[Path, float] = {}
ADVICE = "set NSJAIL_PY_CACHE to a directory of your own, or in a systemd unit CacheDirectory=nsjail_py (nsjail_py-USER with User=)"


def directory(kind: str) -> Path:
    """The cache directory for one kind of thing (`roots`, `filters`), made when it is missing.

    NSJAIL_PY_CACHE, else below $CACHE_DIRECTORY (systemd's CacheDirectory=; where that is noexec, in /var/tmp), else /var/cache/nsjail_py
    for root, else below $XDG_CACHE_HOME or ~/.cache. Raises SetupError where it is not ours, or its programs may not be executed.
    """
    base = _base()
    for path in (base, base / kind):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.lstat()
        except OSError as error:
            raise SetupError("cache directory", error.errno or 0, str(path), ADVICE) from None
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            reason = f"{path} must be a directory that belongs to uid {os.geteuid()} and that nobody else can write"
            raise SetupError("cache directory", detail=reason, advice="remove it, or set NSJAIL_PY_CACHE to a directory of your own")
    if kind in EXECUTED and _is_noexec(base):
        reason = f"{base / kind} is on a file system that is mounted noexec, and the programs of a root have to be executed there"
        raise SetupError("cache directory", detail=reason, advice=ADVICE)
    return base / kind


def _is_noexec(path: Path) -> bool:
    """mount(8). Of what is not there yet: where it would be made."""
    there = next(one for one in (path, *path.parents) if os.path.exists(one))
    return bool(os.statvfs(there).f_flag & os.ST_NOEXEC)


def write(path: Path, data: bytes) -> None:
    """Writes a file of the cache as a whole: a reader sees the old content or the new. Raises SetupError; nothing is left behind."""
    import tempfile

    try:
        descriptor, new = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            Path(new).rename(path)
        except BaseException:
            Path(new).unlink()
            raise
    except OSError as error:
        raise SetupError("cache directory", error.errno or 0, str(path), "set NSJAIL_PY_CACHE to a directory with room") from None


@contextlib.contextmanager
def filling(path: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name when it is whole; where somebody was quicker, his stays. What killed builders left, and what
    nobody uses any more, is removed before. Raises OSError."""
    import fcntl
    import shutil
    import tempfile

    _sweep(path.parent)
    prune(path.parent)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent))
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work
        try:
            work.rename(path)
        except OSError:
            if not path.is_dir():  # ENOTEMPTY
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _sweep(store: Path) -> None:
    """Removes what was never finished: its builder was killed, so that nobody holds the lock."""
    import fcntl
    import shutil

    for work in store.glob(".new-*"):
        with contextlib.suppress(OSError):
            if time.time() - work.stat().st_mtime < STALE:
                continue
            if not work.is_dir():
                work.unlink()
                continue
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(work, ignore_errors=True)
            finally:
                os.close(lock)


def mark(path: Path) -> bool:
    """Notes that an entry is used; false when it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # a cache that can only be read keeps what it has
        return path.exists()
    _marked[path] = time.monotonic()
    return True


def mark_again(path: Path) -> bool:
    """The same for what was marked before; most times, a glance at the clock."""
    return time.monotonic() - _marked.get(path, -AGAIN) < AGAIN or mark(path)


def prune(store: Path) -> None:
    """Removes what nobody uses any more. What cannot be removed stays."""
    oldest = time.time() - UNUSED
    unused = [path for path in store.glob("[!.]*") if _changed(path) < oldest]
    shown = _mounts() if unused else ""
    for path in unused:
        if path.name in shown:
            continue
        gone = path.with_name(f".new-{path.name}")  # if this is killed here, the next sweep finds it
        with contextlib.suppress(OSError):
            path.rename(gone)
            if _changed(gone) >= oldest:  # somebody marked it just now
                gone.rename(path)
            elif gone.is_dir():
                import shutil

                shutil.rmtree(gone, ignore_errors=True)
            else:
                gone.unlink()


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _mounts() -> str:
    """All mounts of all processes that may be looked at, ours among them: jails show their root there."""
    found = []
    for table in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):
            found.append(table.read_text(errors="replace"))
    return "".join(found)


def _base() -> Path:
    if chosen := os.environ.get("NSJAIL_PY_CACHE"):
        try:
            return Path(chosen).absolute()
        except OSError as error:  # there is no current directory
            raise SetupError("cache directory", error.errno or 0, chosen, "set NSJAIL_PY_CACHE to an absolute path") from None
    if given := os.environ.get("CACHE_DIRECTORY"):
        first = Path(given.split(":")[0])
        if _is_noexec(first):  # as systemd has it for DynamicUser=, which comes with a /var/tmp of the unit's own
            return Path(f"/var/tmp/nsjail_py-{os.geteuid()}")
        return first if first.name.startswith("nsjail_py") else first / "nsjail_py"
    if os.geteuid() == 0:
        return Path("/var/cache/nsjail_py")
    if parent := os.environ.get("XDG_CACHE_HOME"):
        return Path(parent) / "nsjail_py"
    home = Path(os.path.expanduser("~"))
    if not os.path.isdir(home) or str(home) == "/":  # or not to be entered: ProtectHome= of a systemd unit
        raise SetupError("cache directory", detail="there is no home directory", advice=ADVICE)
    return home / ".cache" / "nsjail_py"
