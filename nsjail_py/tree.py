"""Minimal roots: directory trees that hold one program and what it needs, copied once into the cache and then only bind-mounted.

A tree is named by a hash over the path, size and time of change of all that goes into it, so a changed interpreter, library or package
gives another tree (treebuild.py makes it). Which tree answers a question is noted beside the trees, with the stamps of what it was made
from: asking again costs one small file, and a stat call for each shared library and each file of the listed distributions. Of the standard
library only the directory and os.py are looked at: whoever edits one of its files in place removes the cache.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from . import cachedir, elf
from .compiled import PATH, SYSTEM
from .digest import sha256
from .errors import PolicyError
from .interpreter import Interpreter, Stamp, stamp
from .prepared import prepared

if TYPE_CHECKING:
    from .treebuild import Builder

FORMAT = 9
"""Raised whenever the same inputs give another tree."""
UNWANTED = frozenset({"test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "site-packages", "dist-packages"})
"""Directories of a standard library that nothing inside needs; packages come from the list of imports only."""
UNWANTED_FILES = ("_tkinter.", "_test", "_ctypes_test.", "_xxtestfuzz.")
"""Extension modules of the same kind; _tkinter alone would bring half of X11."""
PRIVATE = frozenset({"proc", "dev", "tmp", "work", "app", "project", "sys", "run"})
"""Top-level names that are the jail's own."""
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
BY_NAME = ("libgcc_s.so.1", "libnss_files.so.2")
"""Libraries that the C library opens by itself when a thread is cancelled, or a user is looked up (before glibc 2.34)."""
COMMON = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libresolv.so.2", "libstdc++.so.6", *BY_NAME)
"""What comes with a C and a C++ compiler, and most programs need no more."""
LOCALE = "/usr/lib/locale/C.utf8"
"""What LANG names inside; without it programs that ask for their locale are refused one. musl has it built in."""
ETC = {
    "passwd": "jail:x:1000:1000::/work:/usr/sbin/nologin\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n",
    "group": "jail:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n127.0.0.1 jail\n",
    "hostname": "jail\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "resolv.conf": "",
}


class Entry(NamedTuple):
    """One top-level name of a tree."""

    name: str
    link: str | None
    """Text of the symbolic link that it is; None for a directory."""


class Tree(NamedTuple):
    """A built tree."""

    path: Path
    entries: tuple[Entry, ...]
    stamps: tuple[Stamp, ...] = ()
    """What it was made from, and how that was."""


@prepared
class Note(msgspec.Struct, frozen=True):
    """Which tree answers a question, as long as what it was made from stays the same."""

    name: str
    stamps: tuple[Stamp, ...]
    files: tuple[Stamp, ...] = ()
    """Of the listed distributions: they may be many, and are only looked at by a process that does not know the tree yet."""


def python_tree(
    interpreter: Interpreter,
    imports: tuple[str, ...] = (),
    mountpoints: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    *,
    whole: bool = True,
) -> Tree:
    """The interpreter, its libraries, its standard library and the listed distributions; no shell, no other program.

    without: modules of the standard library that are left out; unless it is to be whole, also those that nothing needs (stdlib.py).
    mountpoints: absolute paths that must exist in it, directories with a `/` at the end. Raises PolicyError for what
    cannot be shown, SetupError when the tree cannot be written.
    """
    listed = () if whole else tuple(sorted(name for name in imports if name in sys.stdlib_module_names))
    imports = tuple(name for name in imports if name not in sys.stdlib_module_names)
    question = ("python", interpreter, imports, mountpoints, without, whole, listed)
    if known := _recall(question):
        return known
    from . import distributions, stdlib

    if interpreter.executable.split("/")[1] in PRIVATE:
        raise PolicyError(
            f"interpreter {interpreter.executable}: it lies in a directory that is the jail's own; use one installed elsewhere"
        )
    chosen = distributions.closure(interpreter, imports) if imports else []
    library = {path: path for folder in interpreter.stdlib for path in _library(folder) if _module(path, folder) not in without}
    packages = {path: f"{interpreter.site}/{relative}" for one in chosen for path, relative in distributions.files(one)}
    absent: dict[str, str] = {}
    if not whole:
        library, absent = _needed(interpreter, library, listed, packages)
    modules = [path for path in (*library, *packages) if path.endswith(".so") or ".so." in os.path.basename(path)]
    needs = sorted(_closure([interpreter.executable], modules))
    named = {path: _inside(path, interpreter.site, chosen) for path in needs if path not in packages}
    watched = [interpreter.executable, *interpreter.stdlib, *(f"{folder}/os.py" for folder in interpreter.stdlib)]
    watched += [*(interpreter.search if imports else ()), *(one.record for one in chosen), *named, elf.CACHE_FILE]
    if not whole:
        watched += stdlib.DECIDING
    stamps = tuple(stamp(path) for path in watched)
    files = tuple(stamp(path) for path in packages if not path.endswith(".pyc"))
    contents = (interpreter, stamps, files, tuple(map(stamp, library)), without, whole, listed)

    def fill(builder: Builder) -> None:
        builder.copy(interpreter.executable, interpreter.executable)
        for source, path in (library | packages).items():
            builder.copy(source, path)
        for path, text in absent.items():
            builder.write(path, text)
        builder.libraries(named)
        builder.compile(interpreter)

    return _remember(question, stamps, _tree("python", contents, mountpoints, fill), files)


def _needed(
    interpreter: Interpreter, library: dict[str, str], listed: tuple[str, ...], packages: Iterable[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The files of the standard library that are needed, and texts in the place of the others: their errors say what to change."""
    from . import stdlib

    names = {path: stdlib.module_of(path, folder) for folder in interpreter.stdlib for path in library if path.startswith(f"{folder}/")}
    modules: dict[str, list[str]] = {}
    for path, name in names.items():
        modules.setdefault(name, []).append(path)
    texts = [path for path in packages if not UNWANTED.intersection(path.split("/")[:-1]) - {"site-packages", "dist-packages"}]
    chosen = stdlib.needed(interpreter, modules, listed, texts)
    kept = {path: path for path in library if names.get(path, "") in {"", *chosen}}
    absent = {}
    for path, name in names.items():
        above = name.rpartition(".")[0]
        if path not in kept and path.endswith(".py") and not name.startswith("_") and above in {"", *chosen}:
            absent[path] = stdlib.missing(name)
    return kept, absent


def program_tree(program: str, mountpoints: tuple[str, ...] = ()) -> Tree:
    """The shared libraries of a program, and the program itself when it is one of the system's; with a `#!` line, also what that names.

    Programs from elsewhere with the same libraries share one tree. Errors and mountpoints as for `python_tree`.
    """
    question = ("program", program, mountpoints)
    if is_system(program) and (known := _recall(question)):
        return known
    if not stat.S_ISREG(os.stat(program).st_mode):
        raise PolicyError(f"{program}: not a regular file")
    named_by_it = shebang(program)
    needs = sorted(_closure([program, *named_by_it], []))
    named = {path: path for path in (*named_by_it, *needs)}
    own = [program] if is_system(program) else []
    stamps = tuple(stamp(path) for path in (*own, *named, elf.CACHE_FILE))

    def fill(builder: Builder) -> None:
        for path in own:
            builder.copy(path, path)
        builder.libraries(named)

    tree = _tree("program", stamps, mountpoints, fill)
    return _remember(question, stamps, tree) if own else tree._replace(stamps=stamps)


def library_tree(mountpoints: tuple[str, ...] = ()) -> Tree:
    """The C and C++ libraries and their loader, for any program that needs no others; and no program."""
    needs = sorted({*_closure(["/bin/sh"], _common()), *_common()})
    stamps = tuple(stamp(path) for path in (*needs, elf.CACHE_FILE))
    return _tree("program", stamps, mountpoints, lambda builder: builder.libraries({path: path for path in needs}))._replace(stamps=stamps)


def _common() -> list[str]:
    return [path for name in COMMON if (path := elf.locate(name, ()))]


def is_system(path: str) -> bool:
    """Whether a program is one of the system's: such keep their path inside, any other is shown at /app."""
    return path.startswith(SYSTEM)


def shebang(program: str) -> list[str]:
    """The programs that a script's first line names. The script may be the enemy's: it must not choose just any file (elf.may_show)."""
    found, *sought = shebang_names(program) or [""]
    if sought:
        import shutil

        sought = [real for name in sought if (real := shutil.which(name, path=PATH))]
    return [path for path in (found, *sought) if is_system(path) and os.access(path, os.X_OK) and elf.may_show(path)]


def shebang_names(program: str) -> list[str]:
    """The interpreter's path in a script's first line, and if that is env, the name that it is to look for."""
    with open(program, "rb") as file:
        first = file.readline(256)
    words = os.fsdecode(first[2:]).split() if first.startswith(b"#!") else []
    if not words or not words[0].startswith("/"):
        return []
    interpreter = os.path.normpath(words[0])
    return [interpreter, *(os.path.basename(word) for word in words[1:2] if os.path.basename(interpreter) == "env")]


def _closure(programs: list[str], modules: list[str]) -> set[str]:
    extra = [path for name in BY_NAME if (path := elf.locate(name, ()))] if any(map(elf.loader, programs)) else []
    try:
        return elf.closure(programs, [*modules, *extra]) | set(extra)
    except ValueError as error:
        raise PolicyError(str(error)) from None


def _library(folder: str) -> list[str]:
    """The files of a standard library, without what only development needs; a .zip is its own."""
    if os.path.isfile(folder):
        return [folder]
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in UNWANTED and not name.startswith("config-")]
        found += [f"{here}/{name}" for name in names if not name.startswith(UNWANTED_FILES) and ".opt-" not in name]
    return [path for path in found if os.path.isfile(path)]


def _module(path: str, folder: str) -> str:
    """The module that a file of the standard library belongs to: `_socket` is a part of `socket`."""
    parts = path[len(folder) :].strip("/").removeprefix("lib-dynload/").split("/")
    if parts[0] == "__pycache__":
        parts = parts[1:]
    return parts[0].partition(".")[0].removeprefix("_") if parts else ""


def _inside(path: str, site: str, chosen: Iterable[object]) -> str:
    """Where a library goes: one beside the packages moves with them, so that $ORIGIN still leads to it."""
    for one in chosen:
        folder = str(getattr(one, "folder", "")).rstrip("/") + "/"
        if folder != "/" and path.startswith(folder):
            return f"{site}/{path[len(folder) :]}"
    return path


def _digest(value: object) -> str:
    return sha256(ascii((FORMAT, ETC, links(), stamp(LOCALE), value)).encode()).hexdigest()[:32]  # JSON holds no name that is not UTF-8


def links() -> dict[str, str]:
    """Top-level links of the host, such as lib -> usr/lib, in words that stay within a root."""
    return {name: os.readlink(f"/{name}").lstrip("/") for name in MERGED if os.path.islink(f"/{name}")}


def _recall(question: tuple[object, ...]) -> Tree | None:
    store = cachedir.directory("roots")
    kept = store / f"{_digest(question)}.json"
    try:
        note = msgspec.json.decode(kept.read_bytes(), type=Note)
    except (OSError, msgspec.DecodeError):
        return None
    if any(stamp(known[0]) != known for known in (*note.stamps, *note.files)) or not cachedir.mark(store / note.name):
        return None
    cachedir.mark(kept)
    return _describe(store / note.name)._replace(stamps=note.stamps)


def _remember(question: tuple[object, ...], stamps: tuple[Stamp, ...], tree: Tree, files: tuple[Stamp, ...] = ()) -> Tree:
    with contextlib.suppress(UnicodeEncodeError):  # found anew each time, then
        cachedir.write(tree.path.parent / f"{_digest(question)}.json", msgspec.json.encode(Note(tree.path.name, stamps, files)))
    return tree._replace(stamps=stamps)


def _describe(path: Path) -> Tree:
    with os.scandir(path) as found:
        entries = [Entry(one.name, os.readlink(one.path) if one.is_symlink() else None) for one in found]
    return Tree(path, tuple(sorted(entries)))


def _tree(kind: str, contents: object, mountpoints: tuple[str, ...], fill: Callable[[Builder], None]) -> Tree:
    store = cachedir.directory("roots")
    path = store / f"{kind}-{_digest((kind, contents, mountpoints))}"
    if not cachedir.mark(path):
        from . import treebuild

        treebuild.build(store, path, mountpoints, fill)
    return _describe(path)
