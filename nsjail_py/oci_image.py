"""Root file systems out of container images: an OCI image layout (a directory) or what `docker save` wrote (a .tar), in the cache.

The archive is the enemy's. Nothing in it is followed on the host: every component of an entry's name is looked up beneath the new root,
symbolic links included, as the kernel would inside. Entries with absolute names, `..`, devices, links that leave the tree, more bytes or
entries than an image has, and layers that are not the ones that the image names by their digest are refused, by name, and nothing is kept.
Owners, set-id bits and extended attributes are not taken over. opencontainers/image-spec, layer.md and manifest.md
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import re
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeVar, cast

import msgspec

from . import cachedir, rootfs
from .errors import PolicyError

PREFIX = "oci:"
FORMAT = 2
"""Raised whenever the same image gives another tree."""
REF_NAME = "org.opencontainers.image.ref.name"
MAX_JSON = 4 * 1024**2
MAX_BYTES = 8 * 1024**3
"""Of all that one image unpacks to."""
MAX_ENTRIES = 1_000_000
MAX_LAYERS = 200
MAX_FILES = 10_000
"""Of what docker save wrote: layers and their descriptions."""
MAX_HEADER = 32 * 1024
"""Of what stands before an entry (long names, attributes), which is read into memory."""
MAX_GLOBAL = 100
"""Attributes for all entries that follow, which stay there."""
PIECE = 256 * 1024
DIGITS = re.compile(rb"\d{256}")
"""No name, number or time has so many in a row. tarfile's search in a header that has is quadratic (CVE-2024-6232)."""
MAX_LINKS = 40
DEEPEST = 256
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
T = TypeVar("T")


class Place(NamedTuple):
    """Where an image is, as a policy says it."""

    path: str
    tag: str | None


class Platform(msgspec.Struct):
    """What a manifest is for."""

    architecture: str | None = None
    os: str | None = None


class Descriptor(msgspec.Struct, rename="camel"):
    """opencontainers/image-spec, descriptor.md"""

    digest: str
    media_type: str | None = None
    annotations: dict[str, str] | None = None
    platform: Platform | None = None

    @property
    def tag(self) -> str | None:
        return (self.annotations or {}).get(REF_NAME)

    @property
    def is_ours(self) -> bool:
        for_what, arch = self.platform or Platform(), ARCHES.get(os.uname().machine)
        return (for_what.architecture or arch) == arch and (for_what.os or "linux") == "linux"


class Index(msgspec.Struct):
    """index.json, and any other index."""

    manifests: list[Descriptor]


class Manifest(msgspec.Struct):
    """One image."""

    config: Descriptor
    layers: list[Descriptor]


class RootFs(msgspec.Struct):
    """The part of a configuration that names the layers by what they unpack to."""

    diff_ids: list[str]


class Configuration(msgspec.Struct):
    """An image's configuration."""

    rootfs: RootFs


class Saved(msgspec.Struct, rename="pascal"):
    """One image in manifest.json of `docker save`."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class Layer(NamedTuple):
    """One layer: a tar archive, perhaps compressed."""

    name: str
    diff_id: str
    """SHA-256 of what it unpacks to."""
    open: Callable[[], io.BufferedReader]


def parse(root: str) -> Place:
    """`oci:DIR[:TAG]`. Raises ValueError."""
    path, colon, tag = root.removeprefix(PREFIX).rpartition(":")
    if not colon or "/" in tag:
        path, tag = root.removeprefix(PREFIX), ""
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise ValueError("must be oci:PATH or oci:PATH:TAG, with an absolute path")
    return Place(os.path.normpath(path), tag or None)


def unpacked(root: str) -> Path:
    """The directory that an image is unpacked in, from the cache or made now. Raises PolicyError with the entry that is at fault."""
    place = parse(root)
    try:
        with _source(place) as (key, layers):
            target = cachedir.directory("images") / hashlib.sha256(f"{FORMAT} {key}".encode()).hexdigest()[:32]
            if not cachedir.mark(target):
                _unpack(layers, target)
            return target
    except (OSError, tarfile.TarError, EOFError, zlib.error, RecursionError, OverflowError, ValueError) as error:
        raise PolicyError(f"$.root: {place.path}: {getattr(error, 'strerror', None) or error}") from None
    except Refused as error:
        raise PolicyError(f"$.root: {place.path}: {error}") from None


class Refused(Exception):
    """Something in an image is not as it has to be."""


def _refuse(name: str, why: str) -> NoReturn:
    raise Refused(f"{name!r:.200}: {why}")


# ---------------------------------------------------------------- which layers


@contextlib.contextmanager
def _source(place: Place) -> Iterator[tuple[str, list[Layer]]]:
    """A name for the content, and the layers, lowest first."""
    if os.path.isdir(place.path):
        yield _layout(Path(place.path), place.tag)
        return
    with open(place.path, "rb") as file:
        members: dict[str, tarfile.TarInfo] = {}
        for count, member in enumerate(_members(Bounded(file))):
            if count >= MAX_FILES:
                _refuse(member.name, f"more than {MAX_FILES} entries")
            members[member.name] = member
        yield _saved(file, members, place.tag)


def _json(data: bytes, name: str, kind: type[T]) -> T:
    if len(data) > MAX_JSON:
        _refuse(name, f"larger than {MAX_JSON} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _refuse(name, str(error))


def _layout(top: Path, tag: str | None) -> tuple[str, list[Layer]]:
    """An OCI image layout: index, manifest, configuration, layers, each named by its digest."""

    def blob(descriptor: Descriptor) -> Path:
        match = DIGEST.fullmatch(descriptor.digest)
        if not match:
            _refuse(descriptor.digest, "only sha256 digests are known")
        path = top / "blobs" / "sha256" / match[1]
        if not stat.S_ISREG(os.lstat(path).st_mode):
            _refuse(f"blobs/sha256/{match[1]}", "is no regular file")
        return path

    def checked(descriptor: Descriptor, kind: type[T]) -> T:
        path = blob(descriptor)
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
        if hashlib.sha256(data[: MAX_JSON + 1]).hexdigest() != path.name:
            _refuse(f"blobs/sha256/{path.name}", "is not what its digest says")
        return _json(data, path.name, kind)

    with (top / "index.json").open("rb") as file:
        found = _choose(_json(file.read(MAX_JSON + 1), "index.json", Index), tag)
    for _ in range(3):
        if found.media_type not in INDEXES:
            break
        found = _choose(checked(found, Index), None)
    manifest = checked(found, Manifest)
    paired = _paired(manifest.layers, checked(manifest.config, Configuration))
    return found.digest, [Layer(one.digest, diff_id, _opener(blob(one))) for one, diff_id in paired]


def _opener(path: Path) -> Callable[[], io.BufferedReader]:
    return lambda: path.open("rb")


def _choose(index: Index, tag: str | None) -> Descriptor:
    """The manifest of a tag, for this machine."""
    mine = [one for one in index.manifests if one.is_ours and (tag is None or one.tag in (tag, f"latest:{tag}"))]
    if not mine:
        _refuse("index.json", f"has no image {'' if tag is None else f'with the tag {tag!r} '}for this machine")
    if len({one.digest for one in mine}) > 1:
        _refuse("index.json", f"has several images; name one: {', '.join(repr(one.tag) for one in mine[:9])}")
    return mine[0]


def _saved(file: IO[bytes], members: dict[str, tarfile.TarInfo], tag: str | None) -> tuple[str, list[Layer]]:
    """What `docker save` writes: manifest.json, one configuration and one archive of layers for each image."""

    def part(name: str) -> Callable[[], io.BufferedReader]:
        member = members.get(name)
        if member is None or not member.isreg() or member.issparse():
            _refuse(name, "is missing, or no regular file")
        return lambda: io.BufferedReader(Part(file, member.offset_data, member.size))

    images = _json(part("manifest.json")().read(MAX_JSON + 1), "manifest.json", list[Saved])
    wanted = [one for one in images if tag is None or any(name.rpartition(":")[2] == tag for name in one.repo_tags or ())]
    if len(wanted) != 1:
        _refuse("manifest.json", f"has {len(wanted)} images {'in all' if tag is None else f'with the tag {tag!r}'}; name one by its tag")
    config = part(wanted[0].config)().read(MAX_JSON + 1)
    paired = _paired(wanted[0].layers, _json(config, "configuration", Configuration))
    return hashlib.sha256(config).hexdigest(), [Layer(name, diff_id, part(name)) for name, diff_id in paired]


def _paired(layers: list[T], config: Configuration) -> list[tuple[T, str]]:
    diff_ids = config.rootfs.diff_ids
    if not all(map(DIGEST.fullmatch, diff_ids)):
        _refuse("configuration", "names layers by something else than sha256")
    if len(layers) != len(diff_ids) or len(layers) > MAX_LAYERS:
        _refuse("manifest", f"has not as many layers as its configuration, or more than {MAX_LAYERS}")
    return list(zip(layers, diff_ids, strict=True))


# ---------------------------------------------------------------- unpacking


class Part(io.RawIOBase):
    """The data of one entry of a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.at, self.end = file, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self.file.fileno(), min(len(buffer), self.end - self.at), self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class Bounded:
    """An archive for tarfile, which believes every header: no more of what stands before an entry than there has to be, and no next entry
    that stands before the last one (CVE-2025-8194). The data of entries does not go through tarfile."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.at, self.left = file, 0, MAX_HEADER
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise Refused(f"a header of more than {MAX_HEADER} bytes")
        data = self.data(size)
        if DIGITS.search(data):
            raise Refused("a header with a number that is none")
        self.last = data
        return data

    def data(self, size: int) -> bytes:
        found = self.file.read(size)
        self.at += len(found)
        return found

    def tell(self) -> int:
        return self.at

    def seek(self, to: int) -> None:
        if to < self.at:
            raise Refused("an entry stands before the one before it")
        self._skip(to)

    def _skip(self, to: int) -> None:
        self.at = self.file.seek(to)


class Hashed(Bounded):
    """A layer as it unpacks: counted, and its digest taken."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        super().__init__(file)
        self.name, self.digest = name, hashlib.sha256()

    def data(self, size: int) -> bytes:
        found = super().data(size)
        if self.at > MAX_BYTES:
            _refuse(self.name, f"unpacks to more than {MAX_BYTES} bytes")
        self.digest.update(found)
        return found

    def _skip(self, to: int) -> None:
        while self.at < to and self.data(min(PIECE, to - self.at)):
            pass


def _members(file: Bounded) -> Iterator[tarfile.TarInfo]:
    """The entries of an archive, none of which is kept; the file is where their data begins."""
    with tarfile.open(mode="r:", fileobj=cast("IO[bytes]", file)) as archive:
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]
            if member.size < 0 or len(archive.pax_headers) > MAX_GLOBAL:
                _refuse(member.name, f"has a negative size, or more than {MAX_GLOBAL} attributes before it that are for all")
            file.left = MAX_HEADER
            yield member
        if any(file.last):  # tarfile takes a broken header for the end, which is zeros or nothing
            raise Refused("a header that is none")


def _unpack(layers: list[Layer], target: Path) -> None:
    with cachedir.filling(target) as work:
        root = Root(work)
        for layer in layers:
            _apply(root, layer)
        work.chmod(0o755)


def _apply(root: Root, layer: Layer) -> None:
    with layer.open() as packed, _plain(packed, layer.name) as file:
        hashed = Hashed(file, layer.name)
        added: set[str] = set()
        for member in _members(hashed):
            try:
                root.entry(hashed, member, added)
            except (ValueError, OverflowError) as error:  # a time that is none, a NUL in a name
                _refuse(member.name, str(error))
        while hashed.data(PIECE):
            pass
        if f"sha256:{hashed.digest.hexdigest()}" != layer.diff_id:
            _refuse(layer.name, "is not the layer that the image names")


@contextlib.contextmanager
def _plain(file: io.BufferedReader, name: str) -> Iterator[IO[bytes]]:
    """A layer without its compression, which its first bytes tell."""
    head = file.peek(4)[:4]
    if head[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=file) as plain:
            yield plain  # type: ignore[misc]
    elif head == b"\x28\xb5\x2f\xfd":
        _refuse(name, "is compressed with zstd, which this Python cannot read; `skopeo copy` or `docker save` gives another form")
    else:
        yield file


class Root:
    """The new root. Nobody else writes there meanwhile, and no path that is used on the host has a link in it."""

    def __init__(self, top: Path) -> None:
        self.top = str(top)
        self.bytes = self.entries = 0

    def entry(self, source: Bounded, member: tarfile.TarInfo, added: set[str]) -> None:
        name = member.name
        parts = self._parts(name, name)
        self.entries += 1
        self.bytes += member.size
        if self.entries > MAX_ENTRIES or self.bytes > MAX_BYTES:
            _refuse(name, f"with it, the image has more than {MAX_ENTRIES} entries or {MAX_BYTES} bytes")
        if not parts:
            return
        base = parts[-1]
        parent = self.directory(parts[:-1], name)
        if base.startswith(WHITEOUT):
            self._whiteout(parent, base, name, added)
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
            _refuse(name, "is a device, a pipe or something else that no root needs")
        while path not in added and path != self.top:
            added.add(path)
            path = os.path.dirname(path)

    @staticmethod
    def _parts(path: str, name: str) -> list[str]:
        """The components of a path that the entry of this name has."""
        if path.startswith("/"):
            _refuse(name, "is absolute")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in path:
            _refuse(name, "leads out of the tree")
        if len(parts) > DEEPEST or any(len(os.fsencode(part)) > 255 for part in parts):
            _refuse(name, "is nested too deeply, or too long")
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
                    _refuse(name, "leads to what is not there")
                os.mkdir(path)
                os.chmod(path, 0o755)  # whatever the caller's umask is
                mode = stat.S_IFDIR
            if stat.S_ISLNK(mode):
                followed += 1
                text = os.readlink(path)
                if followed > MAX_LINKS:
                    _refuse(name, "goes through too many links")
                here = [] if text.startswith("/") else here
                rest += reversed(text.split("/"))
            elif stat.S_ISDIR(mode):
                here.append(part)
            else:
                _refuse(name, "goes through what is no directory")
            if len(here) > DEEPEST or len(rest) > 4 * DEEPEST:
                _refuse(name, "is nested too deeply")
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
            _refuse(member.name, "is a sparse file, whose size says nothing")
        left = member.size
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb") as file:
            while left and (piece := source.data(min(left, PIECE))):
                left -= file.write(piece)
            if left:
                _refuse(member.name, "is cut off")
            os.fchmod(file.fileno(), member.mode & 0o777)
            os.utime(file.fileno(), (0, max(0, min(int(member.mtime), 2**31))))

    @staticmethod
    def _link(member: tarfile.TarInfo, parts: list[str], path: str) -> None:
        """Its text is for the inside. One that climbs above the root could only be meant for the outside."""
        depth = len(parts) - 1
        for part in member.linkname.split("/") if not member.linkname.startswith("/") else ():
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0:
                _refuse(member.name, f"is a link out of the tree, to {member.linkname!r:.100}")
        os.symlink(member.linkname, path)

    def _hard_link(self, member: tarfile.TarInfo, path: str) -> None:
        parts = self._parts(member.linkname.removeprefix("/"), member.name)
        if not parts:
            _refuse(member.name, "is a link to nothing")
        source = os.path.join(self.directory(parts[:-1], member.name, make=False), parts[-1])
        if not os.path.lexists(source) or stat.S_ISDIR(os.lstat(source).st_mode):
            _refuse(member.name, f"is a link to {member.linkname!r:.100}, which is no file of the image")
        if source != path:
            os.link(source, self._clear(path), follow_symlinks=False)

    def _whiteout(self, parent: str, base: str, name: str, added: set[str]) -> None:
        """What lower layers have is hidden by the upper one."""
        if base == OPAQUE:
            for below in os.listdir(parent):
                self._hide(os.path.join(parent, below), added)
            return
        hidden = base.removeprefix(WHITEOUT)
        if hidden in ("", ".", ".."):
            _refuse(name, "hides nothing that could be")
        self._hide(os.path.join(parent, hidden), added)

    def _hide(self, path: str, added: set[str]) -> None:
        """Takes away what lower layers have there; what this layer has added, before or below, stays."""
        if path not in added:
            self._clear(path)
        elif os.path.isdir(path) and not os.path.islink(path):
            for below in os.listdir(path):
                self._hide(os.path.join(path, below), added)


def identity(root: str) -> tuple[object, ...]:
    """What is another when the image behind a name is."""
    path = parse(root).path
    return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for name in ("", "index.json") if (status := _status(path, name)))


def _status(path: str, name: str) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return os.stat(os.path.join(path, name) if name else path)
    return None


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
