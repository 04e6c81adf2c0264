"""A root file system out of an image: being unpacked, and looked into.

The content is the enemy's. Nothing in it is followed on the host: every component of a name is looked up beneath the root, symbolic links
included, as the kernel would inside. Entries with absolute names, `..`, devices, links that leave the tree, more bytes or entries than an
image has are refused, by name. Owners, set-id bits and extended attributes are not taken over. opencontainers/image-spec, layer.md
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tarfile
from pathlib import Path

from . import oci_archive, rootfs
from .oci_archive import PIECE, Bounded, Refused, refuse

MAX_ENTRIES = 1_000_000
MAX_LINKS = 40
DEEPEST = 256
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"


class Root:
    """The new root. Nobody else writes there meanwhile, and no path that is used on the host has a link in it."""

    def __init__(self, top: Path) -> None:
        self.top = str(top)
        self.bytes = self.entries = 0
        self.next_layer()

    def next_layer(self) -> None:
        """What is added from here on is another layer's."""
        self._added: set[bytes] = set()
        self._hidden: set[bytes] = set()

    def entry(self, source: Bounded, member: tarfile.TarInfo) -> None:
        name = member.name
        parts = self._parts(name, name)
        self._count(name, member.size)
        if not parts:
            return
        base = parts[-1]
        parent = self.directory(parts[:-1], name)
        if base.startswith(WHITEOUT):
            self._whiteout(parent, base, name)
            return
        path = os.path.join(parent, base)
        if member.isdir():
            self._make_directory(path, member)
        elif member.isreg():
            self._write(source, member, self._clear(path))
        elif member.issym():
            self._link(member, parts, self._clear(path))
        elif member.islnk():
            self._hard_link(member, path)
        else:
            refuse(name, "is a device, a pipe or something else that no root needs")
        while (key := _key(path)) not in self._added and path != self.top:
            self._added.add(key)
            path = os.path.dirname(path)

    def _count(self, name: str, size: int = 0) -> None:
        self.entries += 1
        self.bytes += size
        if self.entries > MAX_ENTRIES or self.bytes > oci_archive.MAX_BYTES:
            refuse(name, f"with it, the image has more than {MAX_ENTRIES} entries or {oci_archive.MAX_BYTES} bytes")

    @staticmethod
    def _parts(path: str, name: str) -> list[str]:
        """The components of a path that the entry of this name has."""
        if path.startswith("/"):
            refuse(name, "is absolute")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in path:
            refuse(name, "leads out of the tree")
        if len(parts) > DEEPEST or any(len(os.fsencode(part)) > 255 for part in parts):
            refuse(name, "is nested too deeply, or too long")
        return parts

    def directory(self, parts: list[str], name: str, make: bool = True) -> str:
        """The directory that these components lead to inside, as a path of the host without links; made where it is missing."""
        here: list[str] = []
        rest, followed = list(reversed(parts)), 0
        while rest:
            part = rest.pop()
            if part in ("", "."):
                continue
            if part == "..":
                here = here[:-1]  # as the kernel does at the root of a file system
                continue
            path = os.path.join(self.top, *here, part)
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                if not make:
                    refuse(name, "leads to what is not there")
                self._count(name)
                os.mkdir(path)
                os.chmod(path, 0o755)  # whatever the caller's umask is
                mode = stat.S_IFDIR
            if stat.S_ISLNK(mode):
                followed += 1
                text = os.readlink(path)
                if followed > MAX_LINKS:
                    refuse(name, "goes through too many links")
                here = [] if text.startswith("/") else here
                rest += reversed(text.split("/"))
            elif stat.S_ISDIR(mode):
                here.append(part)
            else:
                refuse(name, "goes through what is no directory")
            if len(here) > DEEPEST or len(rest) > 4 * DEEPEST:
                refuse(name, "is nested too deeply")
        return os.path.join(self.top, *here)

    @staticmethod
    def _clear(path: str) -> str:
        """What an earlier layer has there goes."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(path).st_mode):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        return path

    def _make_directory(self, path: str, member: tarfile.TarInfo) -> None:
        if not (os.path.lexists(path) and stat.S_ISDIR(os.lstat(path).st_mode)):
            os.mkdir(self._clear(path))
        os.chmod(path, (member.mode & 0o1777) | 0o700)

    @staticmethod
    def _write(source: Bounded, member: tarfile.TarInfo, path: str) -> None:
        if member.issparse():
            refuse(member.name, "is a sparse file, whose size says nothing")
        left = member.size
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb") as file:
            while left and (piece := source.data(min(left, PIECE))):
                left -= file.write(piece)
            if left:
                refuse(member.name, "is cut off")
            os.fchmod(file.fileno(), member.mode & 0o777)
            os.utime(file.fileno(), (0, max(0, min(int(member.mtime), 2**31))))

    @staticmethod
    def _link(member: tarfile.TarInfo, parts: list[str], path: str) -> None:
        """Its text is for the inside. One that climbs above the root could only be meant for the outside."""
        depth = len(parts) - 1
        for part in member.linkname.split("/") if not member.linkname.startswith("/") else ():
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0:
                refuse(member.name, f"is a link out of the tree, to {member.linkname!r:.100}")
        os.symlink(member.linkname, path)

    def _hard_link(self, member: tarfile.TarInfo, path: str) -> None:
        parts = self._parts(member.linkname.removeprefix("/"), member.name)
        if not parts:
            refuse(member.name, "is a link to nothing")
        source = os.path.join(self.directory(parts[:-1], member.name, make=False), parts[-1])
        if not os.path.lexists(source) or stat.S_ISDIR(os.lstat(source).st_mode):
            refuse(member.name, f"is a link to {member.linkname!r:.100}, which is no file of the image")
        if source != path:
            os.link(source, self._clear(path), follow_symlinks=False)

    def _whiteout(self, parent: str, base: str, name: str) -> None:
        """What lower layers have is hidden by the upper one; what this layer has added, before or below, stays."""
        if base == OPAQUE:
            self._hide_below(parent)
            return
        hidden = base.removeprefix(WHITEOUT)
        if hidden in ("", ".", ".."):
            refuse(name, "hides nothing that could be")
        self._hide(os.path.join(parent, hidden))

    def _hide(self, path: str) -> None:
        if _key(path) not in self._added:
            self._clear(path)
        elif os.path.isdir(path) and not os.path.islink(path):
            self._hide_below(path)

    def _hide_below(self, folder: str) -> None:
        """Once for each layer: whatever is there later, the layer has added itself."""
        if (key := _key(folder)) not in self._hidden:
            self._hidden.add(key)
            for below in os.listdir(folder):
                self._hide(os.path.join(folder, below))


def _key(path: str) -> bytes:
    """A path in a set: a million of them may be of 4 KiB each."""
    return hashlib.blake2b(os.fsencode(path), digest_size=16).digest()


def find(top: Path, name: str, search: str) -> tuple[str, str]:
    """A program's path inside an image, and its file on the host. Raises FileNotFoundError (the shell's 127) and PermissionError (126)."""
    root, refused = Root(top), False
    for place in [""] if "/" in name else search.split(":"):
        path = "/" + os.path.normpath(f"/{place}/{name}").lstrip("/")  # which keeps two of them
        try:
            folder = root.directory(path.strip("/").split("/")[:-1], path, make=False)
            real = _final(root, os.path.join(folder, os.path.basename(path)))
        except (Refused, OSError, ValueError):
            continue
        mode = os.stat(real, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode) and mode & 0o111:
            return path, real
        refused = True
    if refused:
        raise PermissionError(13, "not a program that can be executed", name)
    raise FileNotFoundError(2, "no such program in the image", name)


def executables(top: Path, program: str, real: str, search: str) -> list[str]:
    """A program's path inside, and of what the kernel opens with it: what a `#!` line names, and the loaders. Each is the image's."""
    from . import elf, tree

    found = {program: real}

    def add(names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                path, file = find(top, name, search)
                if path.split("/")[1] not in rootfs.PRIVATE:
                    found[path] = file

    add(tree.shebang_names(real))
    add([loader for file in list(found.values()) if (loader := elf.loader(file)) and loader.startswith("/")])
    return list(found)


def _final(root: Root, path: str) -> str:
    """Follows links at the end of a path, inside."""
    for _ in range(MAX_LINKS):
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            return path
        text = os.readlink(path)
        here = [] if text.startswith("/") else path[len(root.top) :].strip("/").split("/")[:-1]
        parts = [*here, *text.strip("/").split("/")]
        path = os.path.join(root.directory(parts[:-1], path, make=False), parts[-1])
    raise Refused("too many links")
