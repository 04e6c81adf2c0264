"""Container images as roots: an OCI image layout (a directory) or what `docker save` wrote (a .tar), unpacked in the cache.

An image names its layers by their digests, and a layer that is another one is refused, with nothing kept. What is in them is the
enemy's: oci_archive.py reads it, oci_root.py keeps it beneath the root. opencontainers/image-spec, manifest.md
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import msgspec

from . import cachedir
from .errors import PolicyError
from .oci_archive import PIECE, Bounded, Hashed, Part, Refused, entries, plain, refuse
from .oci_root import Root
from .prepared import prepared

PREFIX = "oci:"
FORMAT = 2
"""Raised whenever the same image gives another tree."""
REF_NAME = "org.opencontainers.image.ref.name"
NO_IMAGE = "is neither an OCI image layout, which has an index.json, nor the archive that `docker save` writes"
MAX_JSON = 4 * 1024**2
MAX_LAYERS = 200
MAX_FILES = 10_000
"""Of what docker save wrote: layers and their descriptions."""
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


@prepared
class Index(msgspec.Struct):
    """index.json, and any other index."""

    manifests: list[Descriptor]


@prepared
class Manifest(msgspec.Struct):
    """One image."""

    config: Descriptor
    layers: list[Descriptor]


class RootFs(msgspec.Struct):
    """The part of a configuration that names the layers by what they unpack to."""

    diff_ids: list[str]


@prepared
class Configuration(msgspec.Struct):
    """An image's configuration."""

    rootfs: RootFs


@prepared
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


@contextlib.contextmanager
def _source(place: Place) -> Iterator[tuple[str, list[Layer]]]:
    """A name for the content, and the layers, lowest first."""
    if os.path.isdir(place.path):
        yield _layout(Path(place.path), place.tag)
        return
    with _open(place.path) as file:
        members: dict[str, tarfile.TarInfo] = {}
        try:
            for count, member in enumerate(entries(Bounded(file))):
                if count >= MAX_FILES:
                    refuse(member.name, f"more than {MAX_FILES} entries")
                members[member.name] = member
        except (tarfile.TarError, Refused):
            if members:
                raise
        if not members:
            raise Refused(NO_IMAGE)
        yield _saved(file, members, place.tag)


def _json(data: bytes, name: str, kind: type[T]) -> T:
    if len(data) > MAX_JSON:
        refuse(name, f"larger than {MAX_JSON} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        refuse(name, str(error))


def _layout(top: Path, tag: str | None) -> tuple[str, list[Layer]]:
    """An OCI image layout: index, manifest, configuration, layers, each named by its digest."""

    def blob(descriptor: Descriptor) -> Path:
        match = DIGEST.fullmatch(descriptor.digest)
        if not match:
            refuse(descriptor.digest, "only sha256 digests are known")
        path = top / "blobs" / "sha256" / match[1]
        if not stat.S_ISREG(os.lstat(path).st_mode):
            refuse(f"blobs/sha256/{match[1]}", "is no regular file")
        return path

    def checked(descriptor: Descriptor, kind: type[T]) -> T:
        path = blob(descriptor)
        with _open(path) as file:
            data = file.read(MAX_JSON + 1)
        if hashlib.sha256(data[: MAX_JSON + 1]).hexdigest() != path.name:
            refuse(f"blobs/sha256/{path.name}", "is not what its digest says")
        return _json(data, path.name, kind)

    if not os.path.lexists(top / "index.json"):
        raise Refused(NO_IMAGE)
    with _open(top / "index.json") as file:
        found = _choose(_json(file.read(MAX_JSON + 1), "index.json", Index), tag)
    for _ in range(3):
        if found.media_type not in INDEXES:
            break
        found = _choose(checked(found, Index), None)
    manifest = checked(found, Manifest)
    paired = _paired(manifest.layers, checked(manifest.config, Configuration))
    return found.digest, [Layer(one.digest, diff_id, _opener(blob(one))) for one, diff_id in paired]


def _opener(path: Path) -> Callable[[], io.BufferedReader]:
    return lambda: _open(path)


def _open(path: str | Path) -> io.BufferedReader:
    """A regular file: a pipe would have us wait."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        refuse(os.path.basename(path), "is no regular file")
    return open(descriptor, "rb")


def _choose(index: Index, tag: str | None) -> Descriptor:
    """The manifest of a tag, for this machine."""
    mine = [one for one in index.manifests if one.is_ours and (tag is None or one.tag in (tag, f"latest:{tag}"))]
    if not mine:
        refuse("index.json", f"has no image {'' if tag is None else f'with the tag {tag!r} '}for this machine")
    if len({one.digest for one in mine}) > 1:
        refuse("index.json", f"has several images; name one: {', '.join(repr(one.tag) for one in mine[:9])}")
    return mine[0]


def _saved(file: IO[bytes], members: dict[str, tarfile.TarInfo], tag: str | None) -> tuple[str, list[Layer]]:
    """What `docker save` writes: manifest.json, one configuration and one archive of layers for each image."""

    def part(name: str) -> Callable[[], io.BufferedReader]:
        member = members.get(name)
        if member is None or not member.isreg() or member.issparse():
            refuse(name, "is missing, or no regular file")
        return lambda: io.BufferedReader(Part(file, member.offset_data, member.size))

    images = _json(part("manifest.json")().read(MAX_JSON + 1), "manifest.json", list[Saved])
    wanted = [one for one in images if tag is None or any(name.rpartition(":")[2] == tag for name in one.repo_tags or ())]
    if len(wanted) != 1:
        refuse("manifest.json", f"has {len(wanted)} images {'in all' if tag is None else f'with the tag {tag!r}'}; name one by its tag")
    config = part(wanted[0].config)().read(MAX_JSON + 1)
    paired = _paired(wanted[0].layers, _json(config, "configuration", Configuration))
    return hashlib.sha256(config).hexdigest(), [Layer(name, diff_id, part(name)) for name, diff_id in paired]


def _paired(layers: list[T], config: Configuration) -> list[tuple[T, str]]:
    diff_ids = config.rootfs.diff_ids
    if not all(map(DIGEST.fullmatch, diff_ids)):
        refuse("configuration", "names layers by something else than sha256")
    if len(layers) != len(diff_ids) or len(layers) > MAX_LAYERS:
        refuse("manifest", f"has not as many layers as its configuration, or more than {MAX_LAYERS}")
    return list(zip(layers, diff_ids, strict=True))


def _unpack(layers: list[Layer], target: Path) -> None:
    with cachedir.filling(target) as work:
        root = Root(work)
        for layer in layers:
            _apply(root, layer)
        work.chmod(0o755)


def _apply(root: Root, layer: Layer) -> None:
    with layer.open() as packed, plain(packed, layer.name) as file:
        hashed = Hashed(file, layer.name)
        root.next_layer()
        for member in entries(hashed):
            try:
                root.entry(hashed, member)
            except (ValueError, OverflowError) as error:  # a time that is none, a NUL in a name
                refuse(member.name, str(error))
        while hashed.data(PIECE):
            pass
        if f"sha256:{hashed.digest.hexdigest()}" != layer.diff_id:
            refuse(layer.name, "is not the layer that the image names")


def identity(root: str) -> tuple[object, ...]:
    """What is another when the image behind a name is."""
    path = parse(root).path
    return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for name in ("", "index.json") if (status := _status(path, name)))


def _status(path: str, name: str) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return os.stat(os.path.join(path, name) if name else path)
    return None
