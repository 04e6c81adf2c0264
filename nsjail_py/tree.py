"""Minimal roots: directory trees that hold one program and what it needs, copied once into the cache and then only bind-mounted.

A tree is named by a hash over the identity (path, size, time of change) of what goes into it, so a changed interpreter or package gives
another tree. It is built beside its destination and renamed, so a tree that has its name is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import cachedir, elf
from .errors import PolicyError, SetupError
from .interpreter import Interpreter

FORMAT = 4
UNWANTED = {"test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "site-packages", "dist-packages", "lib2to3"}
MERGED = ("bin", "sbin", "lib", "lib32", "lib64")
PATH = "/usr/local/bin:/usr/bin:/bin"
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


def python_tree(interpreter: Interpreter, imports: tuple[str, ...] = (), mountpoints: tuple[str, ...] = ()) -> Tree:
    """The interpreter, its libraries, its standard library and the listed distributions; no shell, no other program."""
    from . import distributions

    chosen = distributions.closure(interpreter.search, imports) if imports else []
    identity = [_identity(interpreter.executable), interpreter, [(d, _identity(d.record)) for d in chosen], mountpoints]

    def fill(builder: Builder) -> None:
        builder.program(interpreter.executable)
        modules: list[str] = []
        for folder in interpreter.stdlib:
            modules += builder.library(folder)
        for distribution in chosen:
            for path, relative in distributions.files(distribution):
                builder.copy(path, f"{interpreter.site}/{relative}")
                if ".so" in relative:
                    modules.append(path)
        for path in _closure([interpreter.executable], modules):
            builder.copy(path, path)
        builder.compile(interpreter)

    return _tree("python", identity, mountpoints, fill)


def program_tree(program: str, mountpoints: tuple[str, ...] = ()) -> Tree:
    """The shared libraries of a program, and the program itself when it is one of the system's; with a `#!` line, also what that names."""
    programs = [program, *_shebang(program)]
    libraries = sorted(_closure(programs, []))
    identity = [[_identity(path) for path in (*programs, *libraries)], mountpoints]

    def fill(builder: Builder) -> None:
        for path in programs:
            if is_system(path):
                builder.program(path)
        for path in libraries:
            builder.copy(path, path)

    return _tree("program", identity, mountpoints, fill)


def is_system(path: str) -> bool:
    return path.startswith(("/usr/", "/bin/", "/sbin/", "/lib", "/opt/"))


def _shebang(program: str) -> list[str]:
    """The interpreter that a script names. The script may be the enemy's: it must not choose any file of the host (see elf.may_show)."""
    with open(program, "rb") as file:
        first = file.readline(256)
    words = os.fsdecode(first[2:]).split() if first.startswith(b"#!") else []
    named = [os.path.normpath(word) for word in words[:1] if word.startswith("/")]
    found = [path for path in named if is_system(path) and os.access(path, os.X_OK) and elf.may_show(path)]
    if found and os.path.basename(found[0]) == "env" and len(words) > 1 and (real := shutil.which(os.path.basename(words[1]), path=PATH)):
        found += [real] if elf.may_show(real) else []
    return found


def _closure(programs: list[str], optional: list[str]) -> set[str]:
    try:
        return elf.closure(programs, optional)
    except ValueError as error:
        raise PolicyError(str(error)) from None


def _identity(path: str) -> tuple[str, int, int]:
    status = os.stat(path)
    return os.path.realpath(path), status.st_size, status.st_mtime_ns


def _tree(kind: str, identity: object, mountpoints: tuple[str, ...], fill) -> Tree:  # type: ignore[no-untyped-def]
    key = hashlib.sha256(json.dumps([FORMAT, kind, identity, mountpoints, ETC]).encode()).hexdigest()[:32]
    store = cachedir.directory("roots")
    path = store / f"{kind}-{key}"
    if not path.is_dir():
        _build(store, path, mountpoints, fill)
    names = sorted(os.listdir(path))
    return Tree(path, tuple(Entry(name, os.readlink(path / name) if (path / name).is_symlink() else None) for name in names))


def _build(store: Path, path: Path, mountpoints: tuple[str, ...], fill) -> None:  # type: ignore[no-untyped-def]
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=store))
    try:
        builder = Builder(work)
        fill(builder)
        for name, text in ETC.items():
            builder.write(f"/etc/{name}", text)
        for point in mountpoints:
            builder.mountpoint(point)
        for here, _, _ in os.walk(work):  # whatever the caller's umask is
            os.chmod(here, 0o755)
        with contextlib.suppress(FileExistsError):  # somebody was quicker: it is the same
            os.rename(work, path)
    except OSError as error:
        if path.is_dir():
            return
        raise SetupError("minimal root", error.errno or 0, str(error.filename or path), "is there room in the cache directory?") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Builder:
    """Copies files into a tree under the paths that they have on the host."""

    def __init__(self, top: Path) -> None:
        self.top = top
        for name in MERGED:
            if os.path.islink(f"/{name}"):
                (top / name).symlink_to(os.readlink(f"/{name}"))

    def place(self, path: str) -> Path:
        """Where a path of the inside lies in the tree, its directory made; /lib and its like go where the host has them."""
        path = os.path.normpath("/" + path.lstrip("/"))  # `..` must not leave the tree
        first = path.split("/")[1]
        if first in MERGED and os.path.islink(f"/{first}"):
            path = "/" + os.readlink(f"/{first}") + path[len(first) + 1 :]
        target = self.top / path.lstrip("/")
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        return target

    def copy(self, source: str, path: str) -> None:
        target = self.place(path)
        if target.exists():
            return
        shutil.copyfile(source, target)
        status = os.stat(source)
        target.chmod(0o755 if status.st_mode & 0o111 else 0o644)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that compiled modules stay valid

    def program(self, path: str) -> None:
        self.copy(path, path)

    def library(self, folder: str) -> list[str]:
        """A standard library, without what only development needs. Returns its extension modules."""
        modules = []
        for here, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if name not in UNWANTED and not name.startswith("config-")]
            for name in names:
                path = os.path.join(here, name)
                if os.path.isfile(path):
                    self.copy(path, path)
                    if name.endswith(".so"):
                        modules.append(path)
        return modules

    def compile(self, interpreter: Interpreter) -> None:
        """Modules that have no compiled form get one: inside, nobody could write it."""
        command = [interpreter.executable, "-I", "-m", "compileall", "-q", "-s", str(self.top), "-j", "1"]
        folders = [self.place(folder) for folder in (*interpreter.stdlib, interpreter.site)]
        subprocess.run([*command, *(str(folder) for folder in folders if folder.is_dir())], capture_output=True, check=False, env={}, timeout=600)

    def write(self, path: str, text: str) -> None:
        target = self.place(path)
        target.write_text(text)
        target.chmod(0o644)

    def mountpoint(self, path: str) -> None:
        target = self.place(path.rstrip("/"))
        if path.endswith("/"):
            target.mkdir(exist_ok=True)
        elif not target.exists():
            target.touch(0o644)
