"""Which shared libraries an ELF program needs, found by reading it: the file is never run (as `ldd` may do).

The search repeats ld.so(8): DT_RPATH of the object and of those that loaded it, DT_RUNPATH, /etc/ld.so.cache, the default directories.
Files are hostile until shown otherwise: every offset is checked and every amount is bounded. Layout: elf(5).
"""

from __future__ import annotations

import os
import stat
import struct
from collections import deque
from collections.abc import Iterable

import msgspec

CACHE_FILE = "/etc/ld.so.cache"

MAX_HEADERS = 1024
MAX_DYNAMIC = 1 << 20
MAX_NEEDED = 1024
MAX_STRING = 4096
MAX_OBJECTS = 4096
MAX_CACHE = 16 << 20

PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NULL, DT_NEEDED, DT_STRTAB, DT_STRSZ, DT_SONAME, DT_RPATH, DT_RUNPATH = 0, 1, 5, 10, 14, 15, 29


class Machine(msgspec.Struct, frozen=True):
    """What differs between processors for the dynamic loader."""

    name: str
    """As in `uname -m`."""
    multiarch: str
    """Debian's directory name below /lib."""
    cache_flags: int
    """Flags of this machine's libraries in ld.so.cache (glibc's ldconfig.h)."""


MACHINES = {62: Machine("x86_64", "x86_64-linux-gnu", 0x0303), 183: Machine("aarch64", "aarch64-linux-gnu", 0x0A03)}


class Object(msgspec.Struct, frozen=True):
    """What one ELF file says about loading it."""

    machine: int
    loader: str | None
    """PT_INTERP: the program that the kernel starts to load this one."""
    needed: tuple[str, ...]
    rpath: tuple[str, ...]
    runpath: tuple[str, ...]


class Closure(msgspec.Struct, frozen=True):
    """What must be visible for a program to start, besides itself. Paths are as the loader will ask for them, links not resolved."""

    loaders: tuple[str, ...]
    libraries: tuple[str, ...]
    needs_cache: bool
    """Whether a library is found through /etc/ld.so.cache only."""


class MissingLibrary(ValueError):
    """A needed library is nowhere on this host."""

    def __init__(self, name: str, needed_by: str) -> None:
        super().__init__(f"{name} is not installed, and {needed_by} needs it")
        self.name, self.needed_by = name, needed_by


def is_elf(path: str | os.PathLike[str]) -> bool:
    """Whether the file starts as an ELF file does; false also when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def read(path: str | os.PathLike[str]) -> Object:
    """Parse one ELF file. Raises ValueError when it is malformed or for another kind of machine, OSError when it cannot be read."""
    name = os.fspath(path)
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block us
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name}: not a regular file")
        return _Reader(name, descriptor, status.st_size).object()
    finally:
        os.close(descriptor)


class _Reader:
    """Bounded reads of one open ELF64 little-endian file."""

    def __init__(self, name: str, descriptor: int, size: int) -> None:
        self.name, self.descriptor, self.size = name, descriptor, size

    def bad(self, what: str) -> ValueError:
        return ValueError(f"{self.name}: malformed ELF file: {what}")

    def bytes(self, offset: int, length: int, what: str) -> bytes:
        if offset + length > self.size:
            raise self.bad(f"{what} lies outside the file")
        data = os.pread(self.descriptor, length, offset)
        if len(data) != length:
            raise self.bad(f"{what} is cut short")
        return data

    def string(self, offset: int, limit: int, what: str) -> str:
        data = self.bytes(offset, max(0, min(MAX_STRING, limit, self.size - offset)), what)
        text, end, _ = data.partition(b"\0")
        if not end:
            raise self.bad(f"{what} has no end")
        return os.fsdecode(text)

    def object(self) -> Object:
        if self.size < 64 or self.bytes(0, 4, "header") != b"\x7fELF":
            raise ValueError(f"{self.name}: not an ELF file")
        header = self.bytes(0, 64, "header")
        kind, machine = struct.unpack_from("<HH", header, 16)
        if header[4:6] != b"\x02\x01" or machine not in MACHINES:
            known = ", ".join(machine.name for machine in MACHINES.values())
            raise ValueError(f"{self.name}: an ELF file for another kind of machine (known: {known})")
        if kind not in (2, 3):
            raise self.bad("neither a program nor a shared library")
        (offset,) = struct.unpack_from("<Q", header, 32)
        entry, count = struct.unpack_from("<HH", header, 54)
        if count and entry != 56 or count > MAX_HEADERS:
            raise self.bad("absurd program headers")
        table = self.bytes(offset, entry * count, "program header table")
        # per header: type, offset in the file, address in memory, size in the file
        segments = [struct.unpack_from("<I4xQQ8xQ", table, position) for position in range(0, len(table), 56)]
        loads = [segment for segment in segments if segment[0] == PT_LOAD]
        loader, dynamic = None, b""
        for type_, start, _, length in segments:
            if type_ == PT_INTERP:
                loader = self.string(start, length, "loader's name")
            elif type_ == PT_DYNAMIC:
                if length > MAX_DYNAMIC:
                    raise self.bad("absurd dynamic section")
                dynamic = self.bytes(start, length, "dynamic section")
        if loader is not None and not loader.startswith("/"):
            raise self.bad("the loader's name is not an absolute path")
        return self._dynamic(machine, loader, dynamic, loads)

    def _dynamic(self, machine: int, loader: str | None, dynamic: bytes, loads: list[tuple[int, ...]]) -> Object:
        single: dict[int, int] = {}
        needed: list[int] = []
        for tag, value in struct.iter_unpack("<QQ", dynamic[: len(dynamic) // 16 * 16]):
            if tag == DT_NULL:
                break
            if tag == DT_NEEDED:
                needed.append(value)
            else:
                single[tag] = value
        if len(needed) > MAX_NEEDED:
            raise self.bad("absurd number of needed libraries")
        wanted = needed or DT_RPATH in single or DT_RUNPATH in single
        strings = self._offset(single.get(DT_STRTAB), loads) if wanted else 0
        length = single.get(DT_STRSZ, 0)

        def text(at: int) -> str:
            if at >= length:
                raise self.bad("a name lies outside the string table")
            return self.string(strings + at, length - at, "a name")

        def paths(tag: int) -> tuple[str, ...]:
            return tuple(part for part in text(single[tag]).split(":") if part) if tag in single else ()

        return Object(machine, loader, tuple(text(at) for at in needed), paths(DT_RPATH), paths(DT_RUNPATH))

    def _offset(self, address: int | None, loads: list[tuple[int, ...]]) -> int:
        for _, offset, start, length in loads:
            if address is not None and start <= address < start + length:
                return address - start + offset
        raise self.bad("the string table lies in no segment")


def closure(programs: Iterable[str], optional: Iterable[str] = (), names: Iterable[str] = ()) -> Closure:
    """The shared libraries of `programs`, of `optional` objects, and those called `names`, with all that these need in turn.

    A library that a program needs and that is missing raises MissingLibrary. An optional object (an extension module of which nobody
    knows whether it will be imported) that is no ELF file or cannot be loaded on this host is left out, and so is a name that is not there.
    What the first program loads counts as present for the optional objects. Static programs need nothing.
    """
    search = _Search()
    everything: dict[str, None] = {}
    base: dict[str, str] | None = None
    for program in programs:
        loaded: dict[str, str] = {}
        search.load(program, loaded)
        base = loaded if base is None else base
        everything.update(dict.fromkeys(loaded.values()))
    machine = next(iter(search.machines), None)
    extra = [found for name in names if machine and (found := search.find(name, machine, ()))]
    everything.update(dict.fromkeys(extra))
    for path in (*extra, *optional):
        loaded = dict(base or {})
        try:
            search.load(path, loaded)
        except (ValueError, OSError):
            continue
        everything.update(dict.fromkeys(loaded.values()))
    loaders = search.loaders
    needs_cache = any(path in search.through_cache for path in everything)
    return Closure(tuple(loaders), tuple(path for path in everything if path not in loaders), needs_cache)


class _Search:
    """The dynamic loader's search, with a memory of what was read."""

    def __init__(self) -> None:
        self.loaders: dict[str, None] = {}
        self.machines: dict[int, None] = {}
        self.through_cache: set[str] = set()
        self._objects: dict[str, Object] = {}
        self._found: dict[tuple[str, int, tuple[str, ...]], str | None] = {}
        self._cache: dict[int, dict[str, str]] = {}

    def object(self, path: str) -> Object:
        if path not in self._objects:
            self._objects[path] = read(path)
        return self._objects[path]

    def load(self, path: str, loaded: dict[str, str]) -> None:
        """Add to `loaded` (name asked for: path found) all that `path` needs."""
        top = self.object(path)
        self.machines.setdefault(top.machine)
        if top.loader is not None and path not in loaded.values():
            if not os.path.exists(top.loader):
                raise MissingLibrary(top.loader, path)
            self.loaders.setdefault(top.loader)
            loaded.setdefault(os.path.basename(top.loader), top.loader)
        queue: deque[tuple[str, tuple[str, ...]]] = deque([(path, ())])
        while queue:
            user, inherited = queue.popleft()
            needs = self.object(user)
            rpath = (*_expand(needs.rpath, user, needs.machine), *inherited)  # DT_RPATH reaches down to what is loaded later
            places = _expand(needs.runpath, user, needs.machine) or rpath  # DT_RUNPATH silences it, and does not reach down
            for name in needs.needed:
                if name in loaded:
                    continue
                found = self.find(name, needs.machine, places)
                if found is None:
                    raise MissingLibrary(name, user)
                loaded[name] = found
                queue.append((found, rpath))
                if len(loaded) > MAX_OBJECTS:
                    raise ValueError(f"{path}: needs an absurd number of libraries")

    def find(self, name: str, machine: int, places: tuple[str, ...]) -> str | None:
        key = (name, machine, places)
        if key not in self._found:
            self._found[key] = self._find(name, machine, places)
        return self._found[key]

    def _find(self, name: str, machine: int, places: tuple[str, ...]) -> str | None:
        if "/" in name:
            return name if name.startswith("/") and self._fits(name, machine) else None
        for place in places:
            if self._fits(path := os.path.join(place, name), machine):
                return path
        musl = any(os.path.basename(loader).startswith("ld-musl-") for loader in self.loaders)
        defaults = _defaults(machine, musl)
        cached = None if musl else self._cached(machine).get(name)
        if cached is not None and self._fits(cached, machine):
            if os.path.dirname(cached) not in defaults:
                self.through_cache.add(cached)
            return cached
        return next((path for place in defaults if self._fits(path := os.path.join(place, name), machine)), None)

    def _fits(self, path: str, machine: int) -> bool:
        """Whether it is a library of this machine: the loader passes over any other."""
        try:
            return self.object(path).machine == machine
        except (OSError, ValueError):
            return False

    def _cached(self, machine: int) -> dict[str, str]:
        if machine not in self._cache:
            self._cache[machine] = read_cache(CACHE_FILE, MACHINES[machine].cache_flags)
        return self._cache[machine]


def _defaults(machine: int, musl: bool) -> tuple[str, ...]:
    """The directories that are built into the loader; Debian's knows /lib/TRIPLET instead of /lib64."""
    if musl:
        return ("/lib", "/usr/local/lib", "/usr/lib")
    multiarch = MACHINES[machine].multiarch
    if os.path.isdir(f"/lib/{multiarch}") or os.path.isdir(f"/usr/lib/{multiarch}"):
        return (f"/lib/{multiarch}", f"/usr/lib/{multiarch}", "/lib", "/usr/lib")
    return ("/lib64", "/usr/lib64", "/lib", "/usr/lib")


def _expand(places: tuple[str, ...], user: str, machine: int) -> tuple[str, ...]:
    """Replace the loader's tokens; what remains relative or unknown is passed over, for it would depend on the current directory."""
    multiarch = MACHINES[machine].multiarch
    lib = f"lib/{multiarch}" if os.path.isdir(f"/lib/{multiarch}") else "lib64"
    tokens = {"ORIGIN": os.path.dirname(user), "LIB": lib, "PLATFORM": MACHINES[machine].name}
    done = []
    for place in places:
        for token, value in tokens.items():
            place = place.replace(f"${{{token}}}", value).replace(f"${token}", value)
        if place.startswith("/") and "$" not in place:
            done.append(os.path.normpath(place))
    return tuple(done)


def read_cache(path: str, flags: int) -> dict[str, str]:
    """Library names and their paths in an ld.so.cache (glibc's dl-cache.h, format 1.1); empty when absent or not understood."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CACHE)
    except OSError:
        return {}
    start = data.find(b"glibc-ld.so.cache1.1")  # an older table may stand before it
    if start < 0 or len(data) < start + 48:
        return {}
    data = data[start:]
    (count,) = struct.unpack_from("<I", data, 20)
    found: dict[str, str] = {}
    for position in range(48, min(48 + 24 * count, len(data) - 23), 24):
        kind, key, value, _, hardware = struct.unpack_from("<IIIIQ", data, position)
        if kind != flags or hardware:  # libraries for a special processor are an optimisation; the plain one is always there too
            continue
        name, target = (os.fsdecode(data[at : at + MAX_STRING].partition(b"\0")[0]) for at in (key, value))
        if name and target.startswith("/"):
            found.setdefault(name, target)
    return found
