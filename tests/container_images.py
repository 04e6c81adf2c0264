"""Container images, made here: layers, layouts, and what docker save writes."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

from nsjail_py import elf, oci_image

Entry = tuple[str, dict[str, object], bytes]


def entry(name: str, data: bytes = b"", **fields: object) -> Entry:
    return name, fields, data


def layer(*entries: Entry) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, fields, data in entries:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layout(top: Path, layers: list[bytes], tag: str = "latest", packed: bool = True, diff_ids: list[str] | None = None) -> Path:
    (top / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)

    def blob(data: bytes) -> dict[str, object]:
        (top / "blobs" / "sha256" / sha(data)[7:]).write_bytes(data)
        return {"digest": sha(data), "size": len(data), "mediaType": "application/octet-stream"}

    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": diff_ids or [sha(one) for one in layers]}}).encode()
    manifest = {"schemaVersion": 2, "config": blob(config), "layers": [blob(gzip.compress(one, 1) if packed else one) for one in layers]}
    described = {**blob(json.dumps(manifest).encode()), "annotations": {oci_image.REF_NAME: tag}}
    index = json.loads((top / "index.json").read_text()) if (top / "index.json").exists() else {"schemaVersion": 2, "manifests": []}
    index["manifests"].append(described)
    (top / "index.json").write_text(json.dumps(index))
    (top / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return top


def saved(path: Path, layers: list[bytes], tag: str = "image:latest") -> Path:
    config = json.dumps({"rootfs": {"diff_ids": [sha(one) for one in layers]}}).encode()
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [tag], "Layers": names}]).encode()
    files = [
        entry("config.json", config),
        entry("manifest.json", manifest),
        *(entry(name, data) for name, data in zip(names, layers, strict=True)),
    ]
    path.write_bytes(layer(*files))
    return path


@functools.cache
def base() -> bytes:
    """A minimal image of our own: a static program would do; it is the host's dash and echo with their libraries."""
    files = {}
    for program in ("/bin/sh", "/bin/cat", "/bin/ls"):
        files[f"usr{program}"] = Path(program).read_bytes()
        for library in elf.closure([program]) - {program}:
            files[library.lstrip("/").replace("lib/", "usr/lib/", 1) if library.startswith("/lib/") else library.lstrip("/")] = Path(
                library
            ).read_bytes()
    names = sorted(files)
    links = [entry("bin", type=tarfile.SYMTYPE, linkname="usr/bin"), entry("lib", type=tarfile.SYMTYPE, linkname="usr/lib")]
    folders = sorted({str(parent) for name in names for parent in Path(name).parents if str(parent) != "."})
    lib64 = [entry("lib64", type=tarfile.SYMTYPE, linkname="usr/lib64")] if "lib64" not in folders and os.path.islink("/lib64") else []
    moved = {name.replace("lib64/", "usr/lib64/", 1) if lib64 and name.startswith("lib64/") else name: name for name in names}
    return layer(
        *[entry(name, type=tarfile.DIRTYPE) for name in folders if not (lib64 and name == "lib64")],
        *links, *lib64, *[entry(name, files[old]) for name, old in moved.items()], entry("etc/image", b"first layer\n", mode=0o644),
    )  # fmt: skip
