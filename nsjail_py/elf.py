"""Which shared libraries a program needs, read from its ELF headers. The file is never run: it may be hostile. elf(5), ld.so(8)"""

from __future__ import annotations

import functools
import os
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NEEDED, DT_STRTAB, DT_RPATH, DT_RUNPATH = 1, 5, 15, 29
MOST_HEADERS, MOST_DYNAMIC, MOST_TEXT = 128, 4096, 4096
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
        if size != 56 or count > MOST_HEADERS:
            raise ValueError(f"{path}: malformed ELF headers")

        def at(position: int, length: int) -> bytes:
            file.seek(min(position, 1 << 62))
            return file.read(length)

        headers = [struct.unpack("<IIQQQQQQ", raw) for i in range(count) if len(raw := at(offset + i * size, size)) == size]
        loads = [(virtual, position, length) for kind, _, position, virtual, _, length, _, _ in headers if kind == PT_LOAD]

        def text(position: int) -> str:
            return os.fsdecode(at(position, MOST_TEXT).split(b"\0", 1)[0])

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
        origin = os.path.dirname(os.path.realpath(path))
        names = tuple(text(strings + value) for tag, value in entries if tag == DT_NEEDED)
        search = [folder for tag, value in entries if tag in (DT_RPATH, DT_RUNPATH) for folder in text(strings + value).split(":")]
        return Needs(loader, names, tuple(folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin) for folder in search if folder))


def loader(path: str) -> str | None:
    """The dynamic loader that a program names; None for a static one or a script."""
    try:
        needs = read(path)
    except (OSError, ValueError):
        return None
    return needs.loader if needs else None


@functools.lru_cache(maxsize=1)
def cached_libraries() -> dict[str, str]:
    """Library name -> path, as the host's loader knows them (ldconfig -p)."""
    try:
        env = {"PATH": "/sbin:/usr/sbin:/bin:/usr/bin", "LC_ALL": "C"}
        listing = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, env=env, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, str] = {}
    for line in listing.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        if arrow and ("x86-64" in name or "AArch64" in name):
            found.setdefault(name.split(" ")[0], path)
    return found


def closure(programs: Iterable[str], optional: Iterable[str] = ()) -> set[str]:
    """Every library and loader that these need, as paths of the host. programs must find all theirs; what an optional file (an extension
    module) lacks is left out. Raises ValueError naming the library that is missing and who needs it."""
    found: set[str] = set()
    rest = [(path, (), True) for path in programs] + [(path, (), False) for path in optional]
    seen: set[str] = set()
    while rest:
        path, inherited, strict = rest.pop()
        if path in seen:
            continue
        seen.add(path)
        needs = read(path)
        if needs is None:
            continue
        search = (*needs.search, *inherited)
        wanted = [(needs.loader, needs.loader)] if needs.loader else []
        wanted += [(name, _locate(name, search)) for name in needs.libraries]
        for name, where in wanted:
            if where is None or not os.path.exists(where):
                if strict:
                    raise ValueError(f"{path} needs {name}, which is not on this host")
                continue
            found.add(where)
            rest.append((where, search, strict))
    return found


def _locate(name: str, search: Iterable[str]) -> str | None:
    if "/" in name:
        return name
    for folder in (*search, *DEFAULT):
        path = f"{folder}/{name}"
        if Path(path).is_file():
            return path
    return cached_libraries().get(name)
