"""Formats of containers: seccomp profiles, images as roots, bundles, and runs under an installed runtime."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT, ROOT
from msgspec.structs import replace

import nsjail_py
from nsjail_py import cachedir, elf, launcher, oci_backend, oci_bundle, oci_image, oci_seccomp, policyfile, syscalls
from nsjail_py.policy import Mount, Policy, Syscalls
from nsjail_py.streams import Ends

PROFILE = ROOT / "tests" / "container_seccomp.json"
RUNTIMES = ("crun", "runc", "runsc")


# ---------------------------------------------------------------- seccomp profiles


def test_a_container_engine_s_profile_becomes_a_policy_that_runs_programs(cli: list[str], tmp_path: Path) -> None:
    text = str(oci_seccomp.load(PROFILE))
    (tmp_path / "p.toml").write_text(f'extends = "moderate"\n{text}')
    assert policyfile.check(tmp_path / "p.toml") == []
    result = nsjail_py.run_python("import subprocess; print(6*7)\nsubprocess.run(['/bin/true'])", policy=tmp_path / "p.toml", root="system")
    assert result.ok and result.denied == {}, result
    done = subprocess.run([*cli, "seccomp", str(PROFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == text


def test_the_policy_never_allows_more_than_the_profile() -> None:
    profile = json.loads(PROFILE.read_text())
    named = {
        name
        for rule in profile["syscalls"]
        for name in rule["names"]
        if rule["action"] == "SCMP_ACT_ALLOW" and "caps" not in rule.get("includes", {})
    }
    found = oci_seccomp.load(PROFILE).syscalls
    assert set(syscalls.calls_of(found)) <= named
    assert not set(syscalls.calls_of(found)) & {"mount", "bpf", "clone3", "ptrace", "reboot"}
    assert len(syscalls.calls_of(found)) > 200


@pytest.mark.parametrize(
    ("rule", "entry", "there"),
    [
        ({"names": ["socket", "bind", "connect", "listen", "accept", "accept4"]}, "@inet-sockets", False),  # without what the set brings along
        ({"names": ["mkdir"]}, "mkdir", True),
        ({"names": ["mkdir"], "includes": {"caps": ["CAP_SYS_ADMIN"]}}, "mkdir", False),
        ({"names": ["mkdir"], "args": [{"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}]}, "mkdir", False),
        ({"names": ["clone", "sched_getaffinity"]}, "@threads", True),
        ({"names": ["clone", "sched_getaffinity"], "args": [{"index": 0, "value": 5, "op": "SCMP_CMP_EQ"}]}, "@threads", False),
        ({"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}, "mkdir", False),
    ],
)  # fmt: skip
def test_conditions_of_a_profile_make_the_policy_narrower_and_never_wider(rule: dict[str, object], entry: str, there: bool) -> None:
    rule = {"action": "SCMP_ACT_ALLOW", **rule}
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}
    assert (entry in oci_seccomp.read(json.dumps(profile).encode()).syscalls.allow) is there


def test_no_name_in_a_profile_adds_a_line_to_the_policy() -> None:
    name = "q\nextends = 'untrusted'\nmounts = [{source = '/etc', target = '/e'}]\n#\r\x1b"
    for args in ([], [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]):
        profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": [name], "action": "SCMP_ACT_ALLOW", "args": args}]}
        said = str(oci_seccomp.read(json.dumps(profile).encode()))
        assert tomllib.loads(said) == {"syscalls": {"exec": False, "on_denied": "errno", "allow": []}}
        assert all(line.isprintable() for line in said.split("\n"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"defaultAction": "SCMP_ACT_ALLOW"}',
        b'{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"action": "X"}]}',
        b"[" * 100000,
    ],
)
def test_what_is_no_allow_list_is_refused(data: bytes) -> None:
    with pytest.raises(nsjail_py.PolicyError):
        oci_seccomp.read(data)


# ---------------------------------------------------------------- images


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


SCRIPT = b"#!/lib/ld.so\n"


@pytest.fixture(scope="module")
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


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSJAIL_PY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("form", ["layout", "layout, not packed", "saved"])
def test_an_image_s_own_programs_run_in_it(form: str, base: bytes, tmp_path: Path) -> None:
    upper = layer(entry("etc/second", b"second layer\n", mode=0o644), entry("etc/.wh.image"))
    if form == "saved":
        root = f"oci:{saved(tmp_path / 'image.tar', [base, upper])}:latest"
    else:
        root = f"oci:{layout(tmp_path / 'image', [base, upper], packed=form == 'layout')}"
    for level in ("moderate", "untrusted"):
        result = nsjail_py.run(["sh", "-c", "echo /etc/*; read line < /etc/second; echo $line"], policy=level, root=root)
        assert result.ok and result.stdout == b"/etc/second\nsecond layer\n", (result.summary, result.stderr)
        assert nsjail_py.run(["/bin/cat", "/etc/second"], policy=level, root=root).check().stdout == b"second layer\n"
    with pytest.raises(FileNotFoundError):
        nsjail_py.run(["/usr/bin/python3"], root=root)


def test_a_tag_chooses_among_images(tmp_path: Path) -> None:
    top = tmp_path / "image"
    for tag in ("a", "b"):
        layout(top, [layer(entry("name", tag.encode()))], tag)
    assert (oci_image.unpacked(f"oci:{top}:b") / "name").read_text() == "b"
    for root, why in ((f"oci:{top}", "several images; name one: 'a', 'b'"), (f"oci:{top}:c", "with the tag 'c'")):
        with pytest.raises(nsjail_py.PolicyError, match=why):
            oci_image.unpacked(root)


HOSTILE: dict[str, tuple[list[list[Entry]], str]] = {
    "absolute": ([[entry("/etc/evil", b"x")]], "/etc/evil"),
    "dots": ([[entry("../evil", b"x")]], r"\.\./evil"),
    "dots in the middle": ([[entry("a/../../evil", b"x")]], "evil"),
    "a link out": ([[entry("out", type=tarfile.SYMTYPE, linkname="../../../etc")]], "'out'"),
    "a link out from below": ([[entry("a/b/out", type=tarfile.SYMTYPE, linkname="../../../etc")]], "'a/b/out'"),
    "a hard link out": ([[entry("passwd", type=tarfile.LNKTYPE, linkname="../../../etc/passwd")]], "'passwd'"),
    "a hard link to the host's": ([[entry("passwd", type=tarfile.LNKTYPE, linkname="/etc/passwd")]], "'passwd'"),
    "a hard link through a link": (
        [[entry("a", type=tarfile.SYMTYPE, linkname="/etc"), entry("passwd", type=tarfile.LNKTYPE, linkname="a/passwd")]], "'passwd'",
    ),
    "a device": ([[entry("disk", type=tarfile.BLKTYPE, devmajor=8)]], "'disk'"),
    "a character device": ([[entry("mem", type=tarfile.CHRTYPE, devmajor=1, devminor=1)]], "'mem'"),
    "a pipe": ([[entry("pipe", type=tarfile.FIFOTYPE)]], "'pipe'"),
    "links without end": (
        [[entry("a", type=tarfile.SYMTYPE, linkname="b"), entry("b", type=tarfile.SYMTYPE, linkname="a"), entry("a/x", b"")]], "'a/x'",
    ),
    "through a file": ([[entry("a", b"x"), entry("a/b", b"x")]], "'a/b'"),
    "nested": ([[entry("/".join("d" * 300), b"x")]], "nested too deeply"),
    "nested by a link": (
        [[entry("l", type=tarfile.SYMTYPE, linkname="/".join("d" * 200)), entry("/".join("d" * 200), type=tarfile.DIRTYPE),
          entry("l/" + "/".join("d" * 200), type=tarfile.DIRTYPE)]], "'l/d/.*nested too deeply",
    ),
    "a whiteout of the parent": ([[entry("a/.wh...", b"")]], "wh"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", ["layout", "saved"])
def test_a_hostile_entry_is_refused_by_name_and_nothing_is_kept(name: str, form: str, tmp_path: Path) -> None:
    layers, told = HOSTILE[name]
    built = [layer(entry("before", b"x"), *entries) for entries in layers]
    root = saved(tmp_path / "i.tar", built) if form == "saved" else layout(tmp_path / "i", built)
    with pytest.raises(nsjail_py.PolicyError, match=told):
        nsjail_py.run(["/bin/true"], root=f"oci:{root}")
    assert os.listdir(cachedir.directory("images")) == []
    assert not (tmp_path / "evil").exists() and not Path("/etc/evil").exists()


def test_a_link_of_one_layer_leads_no_other_layer_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    layers = [layer(entry("way", type=tarfile.SYMTYPE, linkname=str(outside))), layer(entry("way/evil", b"x"))]
    top = oci_image.unpacked(f"oci:{layout(tmp_path / 'i', layers)}")
    assert os.listdir(outside) == []
    assert (top / str(outside).lstrip("/") / "evil").read_bytes() == b"x"  # where the kernel would have put it inside


@pytest.mark.parametrize("whiteout", ["d/.wh..wh..opq", ".wh.d"])
@pytest.mark.parametrize("upper", [["d/sub"], ["d", "d/sub"], ["d/sub", "d/sub/new"], ["d/sub/new"]])
@pytest.mark.parametrize("first", [True, False])
def test_a_whiteout_hides_all_of_lower_layers_and_nothing_of_its_own(whiteout: str, upper: list[str], first: bool, tmp_path: Path) -> None:
    lower = layer(entry("d/old", b"x"), entry("d/sub/old", b"x"), entry("d/sub/deep/old", b"x"), entry("stays", b"x"))
    entries = [entry(name, type=tarfile.REGTYPE if "new" in name else tarfile.DIRTYPE) for name in upper]
    made = layer(*[entry(whiteout)] * first, *entries, *[entry(whiteout)] * (not first))
    top = oci_image.unpacked(f"oci:{layout(tmp_path / 'i', [lower, made])}")
    found = {str(path.relative_to(top)) for path in top.rglob("*")}
    assert found == {"d", "d/sub", "stays", *upper}


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_ENTRIES"])
def test_bombs_are_refused_before_they_fill_the_disk(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oci_image, limit, 1024 * 1024 if limit == "MAX_BYTES" else 50)
    entries = [entry("zeros", bytes(64 << 20))] if limit == "MAX_BYTES" else [entry(f"f{number}", b"") for number in range(100)]
    with pytest.raises(nsjail_py.PolicyError, match=r"zeros|f\d\d"):
        oci_image.unpacked(f"oci:{layout(tmp_path / 'i', [layer(*entries)])}")
    assert os.listdir(cachedir.directory("images")) == []


def pax(data: bytes, size: int | None = None, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Attributes for the next entry, as they are."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(data) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


FILE = tarfile.TarInfo("f").tobuf(tarfile.USTAR_FORMAT)
NEGATIVE = tarfile.TarInfo("f")
NEGATIVE.size = -512
SPARSE = b"".join(b"%d %s\n" % (len(one) + 4, one) for one in (b"GNU.sparse.major=1", b"GNU.sparse.minor=0"))
BOMBS = {
    "a header that says it is huge": pax(b"", (1 << 33) - 1),
    "a huge header": pax(b"30000000 a=" + bytes(30_000_000)),
    "a step back": FILE + pax(b"14 size=-1536\n") + FILE,
    "a step back onto itself": FILE + pax(b"13 size=-512\n") + FILE,
    "a negative size": FILE + NEGATIVE.tobuf(tarfile.GNU_FORMAT) + FILE,
    "no header": FILE + b"x" * 512 + FILE,
    "a small negative size": FILE + pax(b"11 size=-1\n") + FILE,
    "digits": pax(b"1" * 4_000_000) + FILE,
    "short digits": pax(b"1" * 32_000) + FILE,
    "a long list of holes": pax(SPARSE) + FILE + b"100000000\n" + b"0\n" * 10_000_000,
    "attributes for all": b"".join(pax(b"30011 %05d=%s\n" % (n, bytes(29_998)), kind=tarfile.XGLTYPE) + FILE for n in range(2000)),
}


@pytest.mark.parametrize("form", ["layout", "saved", "layer of saved"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_lies_costs_neither_time_nor_memory(name: str, form: str, tmp_path: Path) -> None:
    bomb = BOMBS[name] + bytes(1024)
    if form == "saved":
        (tmp_path / "i").write_bytes(bomb)
    else:
        (layout if form == "layout" else saved)(tmp_path / "i", [bomb])
    code = f"""if True:
        import resource
        from nsjail_py import PolicyError, oci_image
        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
        resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
        try:
            oci_image.unpacked("oci:{tmp_path}/i")
        except PolicyError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.startswith(f"$.root: {tmp_path}/i: ") and done.stdout.count("\n") == 1, done


def test_what_is_not_what_its_digest_says_is_refused(tmp_path: Path) -> None:
    good, other = layer(entry("a", b"a")), layer(entry("a", b"b"))
    with pytest.raises(nsjail_py.PolicyError, match="is not the layer that the image names"):
        oci_image.unpacked(f"oci:{layout(tmp_path / 'i', [good], diff_ids=[sha(other)])}")
    top = layout(tmp_path / "j", [good])
    manifest = json.loads((top / "index.json").read_text())["manifests"][0]["digest"][7:]
    path = top / "blobs" / "sha256" / manifest
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(nsjail_py.PolicyError, match="is not what its digest says"):
        oci_image.unpacked(f"oci:{top}")


@pytest.mark.parametrize("damage", ["cut", "random", "empty", "json", "missing"])
def test_a_damaged_image_is_one_line(damage: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "i.tar", [layer(entry("a", bytes(100000)))])
    data = path.read_bytes()
    changed: dict[str, Callable[[], object]] = {
        "cut": lambda: path.write_bytes(data[: len(data) // 2]), "random": lambda: path.write_bytes(os.urandom(5000)),
        "empty": lambda: path.write_bytes(b""), "json": lambda: path.write_bytes(layer(entry("manifest.json", b"[" * 100000))), "missing": path.unlink,
    }  # fmt: skip
    changed[damage]()
    with pytest.raises(nsjail_py.PolicyError) as told:
        nsjail_py.run(["/bin/true"], root=f"oci:{path}")
    assert "\n" not in str(told.value)


MALFORMED: dict[str, tuple[bytes | Entry, str]] = {
    "a time that is none": (entry("e", pax_headers={"mtime": "nan"}), "'e'"),
    "a time without end": (entry("e", pax_headers={"mtime": "inf"}), "'e'"),
    "a link to NUL": (entry("e", type=tarfile.SYMTYPE, pax_headers={"linkpath": "a\0b"}), "'e'"),
    "a hard link to NUL": (entry("e", type=tarfile.LNKTYPE, pax_headers={"linkpath": "a\0b"}), "'e'"),
    "a NUL in a name": (entry("e", pax_headers={"path": "a\0b"}), "a.*b"),
    "a hole that is no number": (entry("e", pax_headers={"GNU.sparse.map": "x"}), "literal for int"),
    "half a hole": (entry("e", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), "not enough values"),
    "a name on two lines": (entry("/e\nf"), r"e\\nf"),
    "a manifest without digest": (b'{"manifests": [{}]}', "'index.json'.*digest"),
    "a digest that is none": (b'{"manifests": [{"digest": "sha256:\\n/"}]}', "sha256"),
    "an index that is a list": (b"[]", "'index.json'"),
    "a platform that is a word": (b'{"manifests": [{"digest": "", "platform": "linux"}]}', "'index.json'.*platform"),
    "a text that is none": (b'{"manifests": [{"digest": "\xff"}]}', "'index.json'"),
    "a manifest that is empty": (b"{}", "config"),
    "a manifest that is a list": (b"[ ]", "Expected `object`"),
    "a manifest without layers": (json.dumps({"config": {"digest": sha(b"")}}).encode(), "layers"),
    "a configuration that is a list": (json.dumps({"config": {"digest": sha(b"[]")}, "layers": []}).encode(), "Expected `object`"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_image_is_one_line_that_names_what_is_wrong(name: str, tmp_path: Path) -> None:
    what, told = MALFORMED[name]
    if isinstance(what, bytes):
        top = layout(tmp_path / "i", [])
        for blob in (what, b"[]"):
            (top / "blobs" / "sha256" / sha(blob)[7:]).write_bytes(blob)
        is_index = b"manifests" in what or what == b"[]"
        (top / "index.json").write_bytes(what if is_index else json.dumps({"manifests": [{"digest": sha(what)}]}).encode())
    else:
        top = layout(tmp_path / "i", [layer(what)])
    with pytest.raises(nsjail_py.PolicyError, match=told) as error:
        nsjail_py.run(["/bin/true"], root=f"oci:{top}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"{}", b"[]", b"[{}]", b"[[]]", b'[{"Config": "c", "Layers": [1]}]', b'[{"Config": "c", "Layers": []}]'])
def test_a_malformed_manifest_of_docker_save_is_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(layer(entry("manifest.json", data)))
    with pytest.raises(nsjail_py.PolicyError, match=r"'manifest.json'|'c'") as error:
        nsjail_py.run(["/bin/true"], root=f"oci:{tmp_path}/i")
    assert "\n" not in str(error.value)


def test_an_image_for_another_system_is_none_of_several(tmp_path: Path) -> None:
    top = layout(layout(tmp_path / "i", [layer(entry("a", b"windows"))]), [layer(entry("a", b"linux"))])
    index = json.loads((top / "index.json").read_text())
    for one, system in zip(index["manifests"], ("windows", "linux"), strict=True):
        one["platform"] = {"os": system, "architecture": oci_image.ARCHES[os.uname().machine]}
    (top / "index.json").write_text(json.dumps(index))
    assert (oci_image.unpacked(f"oci:{top}") / "a").read_text() == "linux"


@pytest.mark.parametrize("root", ["oci:", "oci:relative", "oci:/a/../b", "oci:/x\0y"])
def test_a_root_that_names_no_place_is_a_fault_of_the_policy(root: str) -> None:
    with pytest.raises(nsjail_py.PolicyError, match="absolute path"):
        nsjail_py.Jail(root=root)


def test_a_script_of_an_image_runs_with_the_image_s_interpreter_and_loader(base: bytes, tmp_path: Path) -> None:
    """None of them is the host's."""
    shell = Path("/bin/sh").read_bytes()
    loader = elf.loader("/bin/sh")
    assert loader
    other = loader[:-4] + ".own"
    made = layer(
        entry("opt/own", shell.replace(loader.encode(), other.encode())), entry(other.lstrip("/"), Path(loader).read_bytes()),
        entry("usr/bin/direct", b"#!/opt/own\necho ran\n"), entry("usr/bin/by-env", b"#!/usr/bin/env own-sh\necho ran\n"),
        entry("usr/bin/env", Path("/usr/bin/env").read_bytes()), entry("usr/bin/own-sh", type=tarfile.SYMTYPE, linkname="/opt/own"),
        entry("entry.sh", b"#!/opt/own\necho ran\n"),
    )  # fmt: skip
    root = f"oci:{layout(tmp_path / 'i', [base, made])}"
    for level in ("moderate", "untrusted"):
        for program in ("direct", "/entry.sh"):
            assert nsjail_py.run([program], policy=level, root=root).check().stdout == b"ran\n"
    top = oci_image.unpacked(root)
    found = oci_image.executables(top, "/usr/bin/by-env", str(top / "usr/bin/by-env"), "/usr/bin")
    assert found == ["/usr/bin/by-env", "/usr/bin/env", "/usr/bin/own-sh", loader, other]


def test_a_program_that_cannot_be_executed_hides_none_behind_it_in_the_path(base: bytes, tmp_path: Path) -> None:
    made = layer(entry("usr/local/bin/cat", b"text", mode=0o644), entry("usr/local/bin/data", b"text", mode=0o644))
    root = f"oci:{layout(tmp_path / 'i', [base, made])}"
    assert nsjail_py.run(["cat", "/etc/image"], root=root).check().stdout == b"first layer\n"
    with pytest.raises(PermissionError):
        nsjail_py.run(["data"], root=root)
    with pytest.raises(FileNotFoundError):
        nsjail_py.run(["a\0b"], root=root)


def test_of_two_first_uses_at_the_same_time_one_stays_and_both_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, apply, quicker = f"oci:{layout(tmp_path / 'i', [layer(entry('a', b'x'))])}", oci_image._apply, []

    def slow(*arguments: object) -> None:
        monkeypatch.setattr(oci_image, "_apply", apply)
        quicker.append(oci_image.unpacked(root))
        (quicker[0] / "first").touch()
        apply(*arguments)

    monkeypatch.setattr(oci_image, "_apply", slow)
    top = oci_image.unpacked(root)
    assert quicker == [top] and sorted(os.listdir(top)) == ["a", "first"]
    assert os.listdir(top.parent) == [top.name]


def test_what_a_killed_unpacking_left_is_swept_away_and_what_nobody_uses_goes(tmp_path: Path) -> None:
    first, second = (f"oci:{layout(tmp_path / name, [layer(entry(name, b'x'))])}" for name in ("a", "b"))
    store, top = cachedir.directory("images"), oci_image.unpacked(first)
    left = store / ".new-left"
    left.mkdir()
    os.utime(left, (time.time() - 2 * cachedir.STALE,) * 2)
    os.utime(top, (time.time() - cachedir.UNUSED - 60,) * 2)
    assert oci_image.unpacked(first) == top  # used
    other = oci_image.unpacked(second)
    assert set(store.iterdir()) == {top, other}
    os.utime(top, (time.time() - cachedir.UNUSED - 60,) * 2)
    third = oci_image.unpacked(f"oci:{layout(tmp_path / 'c', [layer(entry('c', b'x'))])}")
    assert set(store.iterdir()) == {other, third}


def test_an_image_that_was_removed_from_the_cache_is_unpacked_again(base: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jail = nsjail_py.Jail(root=f"oci:{layout(tmp_path / 'i', [base])}", stock=0)
    for _ in range(2):
        assert jail.run(["cat", "/etc/image"]).check().stdout == b"first layer\n"
        shutil.rmtree(cachedir.directory("images"))
        monkeypatch.setattr(cachedir, "AGAIN", 0.0)


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    """As a systemd unit has it with UMask=0077."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_an_image_is_the_same_whatever_the_umask_was(narrow_umask: None, base: bytes, tmp_path: Path) -> None:
    made = layer(entry("implied/below/x", b"text", mode=0o644))
    root = f"oci:{layout(tmp_path / 'i', [base, made])}"
    assert [(oci_image.unpacked(root) / name).stat().st_mode & 0o777 for name in (".", "implied", "implied/below")] == [0o755] * 3
    assert nsjail_py.run(["cat", "/implied/below/x"], root=root).check().stdout == b"text"


def test_owners_set_id_bits_and_times_are_tame(tmp_path: Path) -> None:
    made = layer(entry("suid", b"x", mode=0o6755, uid=0, mtime=2**40), entry("d", type=tarfile.DIRTYPE, mode=0o7000))
    top = oci_image.unpacked(f"oci:{layout(tmp_path / 'i', [made])}")
    assert (top / "suid").stat().st_mode & 0o7777 == 0o755 and (top / "d").stat().st_mode & 0o7777 == 0o1700


# ---------------------------------------------------------------- bundles and runtimes


needs_root = pytest.mark.skipif(not IS_ROOT, reason="a bundle's user ids are root's to give")


def under(runtime: str, bundle: Path, state: Path) -> subprocess.CompletedProcess[bytes]:
    if shutil.which(runtime) is None:
        pytest.skip(f"{runtime} is not installed: apt install {runtime}")
    command = [runtime, "--root", str(state)]
    if runtime == "runsc":
        command += ["--network=none", "--ignore-cgroups", "--oci-seccomp"]
    name = f"nsjail-test-{os.getpid()}"
    command += ["run", f"--bundle={bundle}", name]
    return subprocess.run([*oci_backend.surroundings(runtime), *command], input=b"", capture_output=True, timeout=120, check=False)


@needs_root
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("level", ["moderate", "untrusted"])
def test_a_bundle_runs_with_the_same_view_and_limits(runtime: str, level: str, place: Path, cli: list[str]) -> None:
    written = subprocess.run(
        [*cli, "bundle", level, str(place / "b"), "--", "/bin/cat", "/proc/self/status", "/proc/self/limits"],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert written.returncode == 0, written.stderr
    done = under(runtime, place / "b", place / "state")
    text = done.stdout.decode()
    lines = {line.partition(":")[0]: line.split()[1:] for line in text.splitlines() if ":" in line}
    assert lines["Uid"] == ["1000"] * 4 and lines["CapBnd"] == lines["CapEff"] == ["0" * 16], (done.stderr, text)
    if runtime != "runsc":  # its kernel does not tell
        assert lines["NoNewPrivs"] == ["1"] and lines["Seccomp"] == ["2"]
    limits = policyfile.load(level).limits
    if runtime != "runsc":
        assert f"Max open files            {limits.open_files}" in text
    told = written.stderr.decode()
    assert ("not in the bundle: landlock" in told) is (level == "untrusted")


@needs_root
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_bundle_s_filter_and_root_refuse_what_the_policy_refuses(runtime: str, place: Path) -> None:
    policy = replace(policyfile.load("untrusted"), root="system")
    script = "echo x > /usr/x && echo wrote; echo x > /work/x && echo worked; /bin/true"
    oci_bundle.bundle(policy, place / "b", ["/bin/sh", "-c", script])
    done = under(runtime, place / "b", place / "state")
    assert done.stdout == b"worked\n" and b"Cannot fork" in done.stderr, done


@needs_root
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_bundle_of_an_image_has_its_files_at_the_top(runtime: str, place: Path, base: bytes, tmp_path: Path) -> None:
    image = layout(tmp_path / "i", [base, layer(entry("entry.sh", b"#!/bin/sh\necho ran\n"))])
    oci_bundle.bundle(replace(policyfile.load("moderate"), root=f"oci:{image}"), place / "b", ["/entry.sh"])
    done = under(runtime, place / "b", place / "state")
    assert done.stdout == b"ran\n", done


@needs_root
@pytest.mark.parametrize("name", ["b", "new/b", "old/b", "old"])
def test_a_bundle_that_fails_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(oci_bundle, "_unavailable", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        oci_bundle.bundle("moderate", tmp_path / name, ["/bin/true"])
    assert {path.name for path in tmp_path.rglob("*") if "cache" not in path.parts} == {"old"}


def backend(runtime: str, **changes: object) -> Policy:
    base = policyfile.load("untrusted")
    assert base.syscalls
    return replace(base, backend=f"oci:{runtime}", landlock=False, syscalls=replace(base.syscalls, exec=True), **changes)


WORKING = tuple(filter(shutil.which, RUNTIMES))


@needs_root
@pytest.mark.parametrize("how", ["bundle", *WORKING])
@pytest.mark.parametrize("root", ["image", "directory"])
@pytest.mark.parametrize("target", ["/data/in/input.txt", "/data/dir"])
def test_a_link_of_the_root_s_leads_no_target_of_a_mount_onto_the_host(
    how: str, root: str, target: str, base: bytes, tmp_path: Path
) -> None:
    victim, source = tmp_path / "victim", tmp_path / "source"
    victim.mkdir()
    source.mkdir()
    mount = Mount(source=str(source if target == "/data/dir" else ROOT / "LICENSE"), target=target)
    image = f"oci:{layout(tmp_path / 'i', [base, layer(entry('data', type=tarfile.SYMTYPE, linkname=str(victim)))])}"
    changes = {"root": image if root == "image" else str(oci_image.unpacked(image)), "mounts": (mount,)}
    with pytest.raises(nsjail_py.PolicyError, match=f"mount on {target.removesuffix('/input.txt')}"):
        if how == "bundle":
            oci_bundle.bundle(replace(policyfile.load("moderate"), **changes), tmp_path / "b", ["/bin/sh"])
        else:
            nsjail_py.run(["/bin/sh", "-c", ":"], policy=backend(how, **changes))
    assert os.listdir(victim) == []


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_a_run_under_a_runtime_gives_a_result(runtime: str) -> None:
    source = "import sys\nprint(open('/work/x', 'w').write('abc'), sys.stdin.read())\nprint('err', file=sys.stderr)\nsys.exit(3)"
    result = nsjail_py.run_python(source, policy=backend(runtime), input=b"in")
    assert (result.verdict, result.exit_code, result.stdout, result.stderr) == ("exit", 3, b"3 in\n", b"err\n")
    assert result.wall_time > 0 and result.cpu_source == result.memory_source == "unavailable" and result.peak_processes is None
    states = {one.name: one.state for one in result.protections}
    assert states["own_uid"] == states["nested_userns"] == "unavailable" and states["landlock_fs"] == "not requested"
    assert min(result.timeline.values()) >= 0 and result.timeline["run"] == pytest.approx(result.wall_time * 1e6)


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_limits_and_kills_hold_under_a_runtime(runtime: str) -> None:
    assert nsjail_py.run_python("while True: pass", policy=backend(runtime), wall_time=1.0).verdict == "wall_time"
    assert nsjail_py.run_python("while True: print('x' * 1000)", policy=backend(runtime), output="10K").verdict == "output"
    assert nsjail_py.run_python("x = bytearray(900 << 20)", policy=backend(runtime)).signal == 9
    with nsjail_py.Jail(backend(runtime)).start_python("import time; time.sleep(60)") as process:
        assert process.pid
        process.kill()
        assert process.wait(30).verdict == "killed"


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_a_runtime_gives_away_nothing_that_the_caller_passes(runtime: str, tmp_path: Path) -> None:
    """Some make the container's user the owner of its standard streams, whatever they are."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"text" * 100_000)
    with source.open("rb") as given, target.open("wb") as out:
        nsjail_py.run(["/bin/cat"], policy=backend(runtime), stdin=given, stdout=out, stderr=nsjail_py.STDOUT).check()
        nsjail_py.run(["/bin/true"], policy=backend(runtime), stdin=nsjail_py.DEVNULL, stdout=nsjail_py.DEVNULL).check()
    assert target.read_bytes() == source.read_bytes()
    assert {os.stat(path).st_uid for path in (source, target, os.devnull)} == {0}


def test_no_stream_of_a_runtime_s_changes_when_it_makes_another_non_blocking() -> None:
    """runsc does, and inside a program that shared them would find its writes refused as soon as the pipe was full."""
    ends = Ends(nsjail_py.DEVNULL, nsjail_py.PIPE, nsjail_py.STDOUT, only_pipes=True)
    _, out, err = ends.inside
    assert os.path.sameopenfile(out, err)
    os.set_blocking(out, False)
    assert os.get_blocking(err)
    ends.close()


def test_nothing_but_pipes_goes_to_a_runtime() -> None:
    with open(os.devnull, "r+b") as null:
        for streams in ((None, None, None), (null, null, nsjail_py.STDOUT), (nsjail_py.PIPE, nsjail_py.DEVNULL, null)):
            ends = Ends(*streams, only_pipes=True)
            assert all(stat.S_ISFIFO(os.fstat(descriptor).st_mode) for descriptor in ends.inside)
            ends.close()


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_no_other_user_of_the_host_reads_a_run_s_script_arguments_or_environment(runtime: str) -> None:
    policy = backend(runtime, env={"KEY": "secret"})
    with nsjail_py.Jail(policy).start_python(
        "print('secret', flush=True); input()", stdin=nsjail_py.PIPE, stdout=nsjail_py.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"secret\n"
        assert isinstance(process, oci_backend.OciProcess)
        find = ["find", str(process._run.top), "-xdev", "-type", "f", "-exec", "grep", "-l", "secret", "{}", "+"]
        assert len(subprocess.run(find, capture_output=True, check=False).stdout.splitlines()) > 1
        nobody = subprocess.run(find, user=65534, group=65534, extra_groups=[], capture_output=True, check=False)
        assert nobody.stdout == b"" and b"main.py: Permission denied" in nobody.stderr, nobody
        process.kill()


@needs_root
def test_a_run_under_a_runtime_leaves_nothing(leaves_nothing: None) -> None:
    before = set(os.listdir("/run/nsjail_py"))
    nsjail_py.run_python("print(1)", policy=backend("runc")).check()
    assert set(os.listdir("/run/nsjail_py")) <= before


@needs_root
@pytest.mark.elsewhere(not oci_backend.HYBRID.is_mount(), why="its control groups are of one version")
@pytest.mark.skipif(not shutil.which("crun"), reason="crun is not installed: apt install crun")
def test_crun_has_its_control_groups_of_version_1_where_it_refuses_those_of_both() -> None:
    with nsjail_py.Jail(backend("crun")).start_python("import time; time.sleep(60)") as process:
        groups = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
        (group,) = [line.split(":", 2)[2] for line in groups if ":memory:" in line]
        limit = Path(f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes").read_text()
        assert int(limit) == policyfile.load("untrusted").limits.memory
        process.kill()
    assert oci_backend.HYBRID.is_mount() and not Path(f"/sys/fs/cgroup/memory{group}").exists()


@needs_root
@pytest.mark.parametrize("runtime", WORKING)
def test_a_runtime_runs_whatever_the_umask_was(runtime: str, place: Path, narrow_umask: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "text").write_text("text")
    (place / "text").chmod(0o644)
    mounts = (Mount(source=str(place / "text"), target="/data/text"),)
    oci_bundle.bundle(replace(policyfile.load("moderate"), mounts=mounts), place / "new" / "b", ["/bin/cat", "/data/text"])
    done = under(runtime, place / "new" / "b", place / "state")
    assert done.stdout == b"text", done
    monkeypatch.setattr(launcher, "LOCKS", place / "locks")
    assert nsjail_py.run(["/bin/cat", "/data/text"], policy=backend(runtime, mounts=mounts)).check().stdout == b"text"


@needs_root
def test_what_a_runtime_cannot_give_is_an_error_that_names_the_lines() -> None:
    with pytest.raises(nsjail_py.Unavailable, match=r"Landlock.*landlock = false.*exec = true"):
        nsjail_py.Jail(backend="oci:runc")
    with pytest.raises(nsjail_py.Unavailable, match="preload"):
        nsjail_py.Jail(backend("runc"), preload=[])


def test_a_missing_runtime_is_an_error_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(oci_backend, "CLEAN_PATH", str(tmp_path))
    with pytest.raises(nsjail_py.Unavailable, match="apt install runsc"):
        nsjail_py.Jail(backend("runsc"))


@pytest.mark.parametrize("name", ["docker", "oci:", "oci:../runc", "OCI:runc"])
def test_a_backend_that_is_none_is_a_fault_of_the_policy(name: str) -> None:
    with pytest.raises(nsjail_py.PolicyError, match="backend"):
        nsjail_py.Jail(backend=name)


def test_a_bundle_does_not_write_over_another(tmp_path: Path) -> None:
    (tmp_path / "b" / "rootfs").mkdir(parents=True)
    with pytest.raises(nsjail_py.JailError):
        oci_bundle.bundle("moderate", tmp_path / "b", ["/bin/true"])


def test_rules_written_for_a_runtime_are_those_of_the_policy() -> None:
    written = oci_seccomp.write(Syscalls(allow=("@files", "@threads"), exec=False), executes=False)
    allowed = {name for rule in written["syscalls"] for name in rule["names"] if rule["action"] == "SCMP_ACT_ALLOW"}
    assert allowed == set(syscalls.calls_of(Syscalls(allow=("@files", "@threads"), exec=False)))
    again = oci_seccomp.read(json.dumps(written).encode())
    assert set(syscalls.calls_of(again.syscalls)) <= allowed
