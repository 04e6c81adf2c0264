"""Container images as roots: what is in them runs, and what lies in them leads nowhere."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE
from container_images import Entry, base, entry, layer, layout, saved, sha

import nsjail_py
from nsjail_py import cachedir, elf, oci_archive, oci_image, oci_root

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("form", ["layout", "layout, not packed", "saved"])
def test_an_image_s_own_programs_run_in_it(form: str, tmp_path: Path) -> None:
    upper = layer(entry("etc/second", b"second layer\n", mode=0o644), entry("etc/.wh.image"))
    if form == "saved":
        root = f"oci:{saved(tmp_path / 'image.tar', [base(), upper])}:latest"
    else:
        root = f"oci:{layout(tmp_path / 'image', [base(), upper], packed=form == 'layout')}"
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


def test_a_whiteout_that_is_repeated_looks_into_each_directory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, listdir = 0, os.listdir

    def counted(path: str) -> list[str]:
        nonlocal looks
        looks += 1
        return listdir(path)

    monkeypatch.setattr(os, "listdir", counted)
    folders = ["/".join(["d"] * depth) for depth in range(1, 11)]
    hiding = [entry(os.path.join(*name)) for one in folders for name in ((one, ".wh..wh..opq"), (os.path.dirname(one), ".wh.d"))]
    upper = layer(*(entry(f"{one}/new") for one in folders), *hiding * 5)
    top = oci_image.unpacked(f"oci:{layout(tmp_path / 'i', [layer(entry('d/old')), upper])}")
    assert {path.name for path in top.rglob("*")} == {"d", "new"}
    assert looks < 2 * len(folders)


BOMBS_OF = {
    "bytes": [entry("zeros", bytes(64 << 20))],
    "entries": [entry(f"f{number}", b"") for number in range(100)],
    "implied directories": [entry("/".join(["f00"] * 200))],
}


@pytest.mark.parametrize("many", BOMBS_OF)
def test_bombs_are_refused_before_they_fill_the_disk(many: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oci_archive, "MAX_BYTES", 1024 * 1024)
    monkeypatch.setattr(oci_root, "MAX_ENTRIES", 50)
    with pytest.raises(nsjail_py.PolicyError, match=r"(zeros|f\d\d).*more than"):
        oci_image.unpacked(f"oci:{layout(tmp_path / 'i', [layer(*BOMBS_OF[many])])}")
    assert os.listdir(cachedir.directory("images")) == []


def test_long_names_are_not_kept_in_memory(tmp_path: Path) -> None:
    root, folder = oci_root.Root(tmp_path), "/".join(["n" * 200] * 15)
    tracemalloc.start()
    try:
        for number in range(1000):
            made = tarfile.TarInfo(f"{folder}/{number}")
            made.type = tarfile.DIRTYPE
            root.entry(oci_archive.Bounded(io.BytesIO()), made)
        assert tracemalloc.get_traced_memory()[1] < 1000 * len(folder) / 4
    finally:
        tracemalloc.stop()


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


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"no archive"), lambda path: path.touch()])
def test_what_is_no_image_at_all_is_told_what_would_be_one(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "i")
    with pytest.raises(
        nsjail_py.PolicyError, match=f"{tmp_path}/i: is neither an OCI image layout, which has an index.json, nor the archive"
    ):
        oci_image.unpacked(f"oci:{tmp_path}/i")


@pytest.mark.parametrize("name", ["index.json", "blobs/sha256/" + sha(b"[]")[7:], "i.tar"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(name: str, cli: list[str], tmp_path: Path) -> None:
    top = layout(tmp_path, [])
    (top / "index.json").write_text(json.dumps({"manifests": [{"digest": sha(b"[]")}]}))
    (top / name).unlink(missing_ok=True)
    os.mkfifo(top / name)
    root = f"oci:{top / name if name == 'i.tar' else top}"
    done = subprocess.run([*cli, "exec", "--root", root, "--", "true"], capture_output=True, text=True, timeout=20 * PATIENCE, check=False)
    assert done.returncode == 125 and "is no regular file" in done.stderr, done


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


def test_a_script_of_an_image_runs_with_the_image_s_interpreter_and_loader(tmp_path: Path) -> None:
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
    root = f"oci:{layout(tmp_path / 'i', [base(), made])}"
    for level in ("moderate", "untrusted"):
        for program in ("direct", "/entry.sh"):
            assert nsjail_py.run([program], policy=level, root=root).check().stdout == b"ran\n"
    top = oci_image.unpacked(root)
    found = oci_root.executables(top, "/usr/bin/by-env", str(top / "usr/bin/by-env"), "/usr/bin")
    assert found == ["/usr/bin/by-env", "/usr/bin/env", "/usr/bin/own-sh", loader, other]


def test_a_program_that_cannot_be_executed_hides_none_behind_it_in_the_path(tmp_path: Path) -> None:
    made = layer(entry("usr/local/bin/cat", b"text", mode=0o644), entry("usr/local/bin/data", b"text", mode=0o644))
    root = f"oci:{layout(tmp_path / 'i', [base(), made])}"
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


def test_an_image_that_was_removed_from_the_cache_is_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jail = nsjail_py.Jail(root=f"oci:{layout(tmp_path / 'i', [base()])}", stock=0)
    for _ in range(2):
        assert jail.run(["cat", "/etc/image"]).check().stdout == b"first layer\n"
        shutil.rmtree(cachedir.directory("images"))
        monkeypatch.setattr(cachedir, "AGAIN", 0.0)


def test_an_image_is_the_same_whatever_the_umask_was(narrow_umask: None, tmp_path: Path) -> None:
    made = layer(entry("implied/below/x", b"text", mode=0o644))
    root = f"oci:{layout(tmp_path / 'i', [base(), made])}"
    assert [(oci_image.unpacked(root) / name).stat().st_mode & 0o777 for name in (".", "implied", "implied/below")] == [0o755] * 3
    assert nsjail_py.run(["cat", "/implied/below/x"], root=root).check().stdout == b"text"


def test_owners_set_id_bits_and_times_are_tame(tmp_path: Path) -> None:
    made = layer(entry("suid", b"x", mode=0o6755, uid=0, mtime=2**40), entry("d", type=tarfile.DIRTYPE, mode=0o7000))
    top = oci_image.unpacked(f"oci:{layout(tmp_path / 'i', [made])}")
    assert (top / "suid").stat().st_mode & 0o7777 == 0o755 and (top / "d").stat().st_mode & 0o7777 == 0o1700
