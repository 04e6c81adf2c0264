"""Which shared libraries a program needs, read from its ELF headers. elf(5), ld.so(8)

The file is never run, and never trusted: its author may be the enemy, and root copies what it names into a tree that he can read. So only
regular ELF files that everybody may read anyway are ever given out (`may_show`), and every loop has a bound.
"""

from __future__ import annotations

import functools
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .errors import passes

CACHE_FILE = "/etc/ld.so.cache"
PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NEEDED, DT_STRTAB, DT_RPATH, DT_RUNPATH = 1, 5, 15, 29
MOST_HEADERS, MOST_DYNAMIC, MOST_TEXT = 128, 4096, 4096
MOST_NEEDED, MOST_FOLDERS, MOST_FILES = 256, 64, 4096
DEFAULT = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib")


class Needs(NamedTuple):
    """What one file asks of the loader."""

    loader: str | None
    libraries: tuple[str, ...]
    search: tuple[str, ...]


def read(path: str) -> Needs | None:
    """The needs of an ELF file, None for any other. Raises ValueError for a malformed one."""
    with open(path, "rb") as file:
        head = file.read(64)
        if head[:4] != b"\x7fELF" or len(head) < 64:
            return None
        if head[4:6] != b"\x02\x01":
            raise ValueError(f"{path}: only 64-bit little-endian programs can be run")
        offset, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
        if count > MOST_HEADERS or (count and size != 56):
            raise ValueError(f"{path}: malformed ELF headers")

        end = os.fstat(file.fileno()).st_size

        def at(position: int, length: int) -> bytes:
            file.seek(min(position, end))
            return file.read(length)

        headers = [struct.unpack("<IIQQQQQQ", raw) for i in range(count) if len(raw := at(offset + i * size, size)) == size]
        loads = [(virtual, position, length) for kind, _, position, virtual, _, length, _, _ in headers if kind == PT_LOAD]

        def text(position: int) -> str:
            value, terminator, _ = at(position, MOST_TEXT).partition(b"\0")
            if not terminator:
                raise ValueError(f"{path}: malformed ELF headers: a name without an end")
            return os.fsdecode(value)

        loader = next((text(h[2]) for h in headers if h[0] == PT_INTERP), None)
        entries: list[tuple[int, int]] = []
        for header in headers:
            if header[0] == PT_DYNAMIC:
                raw = at(header[2], min(header[5], MOST_DYNAMIC * 16))
                entries = [struct.unpack_from("<QQ", raw, i) for i in range(0, len(raw) - 15, 16)]
        table = next((value for tag, value in entries if tag == DT_STRTAB), 0)
        strings = next((position + table - virtual for virtual, position, length in loads if virtual <= table < virtual + length), None)
        if strings is None:
            return Needs(loader, (), ())
        needed = [value for tag, value in entries if tag == DT_NEEDED]
        searched = [value for tag, value in entries if tag in (DT_RPATH, DT_RUNPATH)]
        folders: list[str] = []
        for value in searched[: MOST_FOLDERS + 1]:
            # A relative folder means the caller's directory.
            folders += [one for one in text(strings + value).split(":") if one.startswith(("/", "$ORIGIN", "${ORIGIN}"))]
            if len(folders) > MOST_FOLDERS:
                break
        if len(needed) > MOST_NEEDED or len(searched) > MOST_FOLDERS or len(folders) > MOST_FOLDERS:
            raise ValueError(f"{path}: malformed ELF headers: too many libraries or folders")
        return Needs(
            loader, tuple(text(strings + value) for value in needed), tuple(_expanded(folders, os.path.dirname(os.path.realpath(path))))
        )


def _expanded(folders: Iterable[str], origin: str) -> Iterator[str]:
    """Normalised, since the path is used in the tree too: `..` must not leave it. One that has become too long for a path leads nowhere."""
    for folder in folders:
        path = folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin)
        if len(path) < MOST_TEXT:
            yield os.path.normpath(path)


def may_show(path: str) -> bool:
    """Whether a file that another file merely names may be copied for it: a regular ELF file that everybody, or only we, may read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError:
        return False
    except OSError as error:
        if passes(error):
            raise
        return False
    try:
        return may_show_open(descriptor)
    finally:
        os.close(descriptor)


def may_show_open(descriptor: int) -> bool:
    """The same for an open file, which nobody can exchange for another any more."""
    status = os.fstat(descriptor)
    own = status.st_uid == os.geteuid() != 0
    readable = own or bool(status.st_mode & stat.S_IROTH)
    return readable and stat.S_ISREG(status.st_mode) and os.pread(descriptor, 4, 0) == b"\x7fELF"


def loader(path: str) -> str | None:
    """The dynamic loader that a program names; None for a static one or a script."""
    try:
        needs = read(path)
    except ValueError:
        return None
    except OSError as error:
        if passes(error):
            raise
        return None
    return needs.loader if needs else None


@functools.lru_cache(maxsize=1)
def cached_libraries() -> dict[str, str]:
    """Library name -> path, as the host's loader knows them (ldconfig -p)."""
    import subprocess

    try:
        listing = subprocess.run(
            ["ldconfig", "-p"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # Python 3.11.2 loses the first pipe when there is no descriptor left for a second
            text=True,
            env={"PATH": "/sbin:/usr/sbin:/bin:/usr/bin", "LC_ALL": "C"},
            timeout=10,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired:
        return {}
    except OSError as error:
        if passes(error):
            raise
        return {}
    found: dict[str, str] = {}
    for line in listing.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        if arrow and ("x86-64" in name or "AArch64" in name):
            found.setdefault(name.split(" ")[0], path)
    return found


def closure(programs: Iterable[str], optional: Iterable[str] = ()) -> set[str]:
    """Every library and loader that these need, as paths of the host. programs must find all theirs; what an optional file (an extension
    module) lacks, or one that is malformed, is left out. Raises ValueError naming the library that is missing and who needs it."""
    found: set[str] = set()
    rest: list[tuple[str, tuple[str, ...], bool]] = [(path, (), False) for path in optional]
    rest += [(path, (), True) for path in programs]
    seen: set[str] = set()
    while rest:
        path, inherited, strict = rest.pop()
        if path in seen:
            continue
        seen.add(path)
        try:
            needs = read(path)
        except ValueError:
            if strict:
                raise
            continue
        if needs is None:
            continue
        search = tuple(dict.fromkeys((*needs.search, *inherited)))[:MOST_FOLDERS]
        wanted = [needs.loader] if needs.loader else []
        for name in (*wanted, *needs.libraries):
            where = locate(name, search)
            if where is None:
                if strict:
                    raise ValueError(f"{path} needs {name}, which is not a library on this host")
                continue
            found.add(where)
            rest.append((where, search, strict))
        if strict and len(found) > MOST_FILES:
            raise ValueError(f"{path}: more than {MOST_FILES} libraries are needed")
    return found


def locate(name: str, search: Iterable[str]) -> str | None:
    """The path of a library, or of the loader; None where there is none, or none that may be shown."""
    if "/" in name:
        path = os.path.normpath(name)
        return path if name.startswith("/") and may_show(path) else None
    for folder in (*search, *DEFAULT):
        path = f"{folder}/{name}"
        if may_show(path):
            return path
    path = cached_libraries().get(name, "")
    return path if may_show(path) else None


def found_by_cache(libraries: Iterable[str]) -> list[str]:
    """Those of these that the loader may find by their name alone: in a standard folder, or in its cache on the host."""
    cached = set(cached_libraries().values())
    return [path for path in libraries if ".so" in path and (os.path.dirname(path) in DEFAULT or path in cached)]
