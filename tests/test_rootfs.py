"""The order of the mount steps is a promise: no target is ever made inside something that was mounted, and none leads out of the new root."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from conftest import IS_ROOT

import nsjail_py
from nsjail_py import Jail, Mount, compiled
from nsjail_py._native import lib

MADE = {lib.MOUNT_DIRECTORY, lib.MOUNT_FILE, lib.MOUNT_SYMLINK}


def test_every_target_is_made_before_anything_is_mounted(level: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "file").touch()
    mounts = [Mount(source=str(tmp_path / name), target=f"/shown/{name}") for name in ("data", "file")]
    jail = Jail(level, mounts=mounts, workdir=str(tmp_path / "data"))
    for made in (compiled.for_program(jail.policy, jail._host(), "/bin/true"), compiled.for_python(jail.policy, jail._host())):
        kinds = [step.kind in MADE for step in made.mounts]
        assert kinds == sorted(kinds, reverse=True)
        assert {"/shown/data", "/shown/file", "/work"} <= {step.target for step in made.mounts if step.kind in MADE}


def write(name: str, **shown: object) -> str:
    """What a run says that writes a file of this name."""
    return nsjail_py.run(["/bin/sh", "-c", f"echo > {name} && echo written"], policy="moderate", **shown).stdout.decode().strip()


def test_a_mount_may_lie_in_a_work_directory_that_has_a_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "work" / "data").mkdir(parents=True)
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "name").write_text("here")
    jail = Jail("moderate", workdir=str(tmp_path / "work"), mounts=[Mount(source=str(tmp_path / "shown"), target="/work/data")])
    assert jail.run(["/bin/cat", "data/name"]).check().stdout == b"here"
    (tmp_path / "work" / "data").rmdir()
    with pytest.raises(nsjail_py.SetupError, match=r"on /work/data\); .* make it there, or choose another"):
        jail.run(["/bin/true"])


def test_a_work_directory_that_is_made_anew_is_the_work_directory(tmp_path: Path) -> None:
    """A server's, that makes one for each request under the same name."""
    for _ in range(3):
        (tmp_path / "work").mkdir()
        assert write("out", workdir=str(tmp_path / "work")) == "written"
        shutil.rmtree(tmp_path / "work")


@pytest.mark.parametrize("level", ["untrusted", "moderate"])
def test_one_file_can_be_shown_writable(level: str, tmp_path: Path) -> None:
    (tmp_path / "shown").write_text("before")
    (tmp_path / "shown").chmod(0o666)
    jail = Jail(level, mounts=[Mount(source=str(tmp_path / "shown"), target="/data/file", writable=True)])
    jail.run_python("open('/data/file', 'w').write('after')").check()
    assert (tmp_path / "shown").read_text() == "after"


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a directory away")
@pytest.mark.parametrize("path", ["/", "/etc", "/usr/share", "/var/lib", "/root", "/tmp/.."])
def test_no_directory_of_the_systems_is_given_to_a_run(path: str) -> None:
    before = os.stat(path)
    with pytest.raises(nsjail_py.PolicyError, match="make a directory for it"):
        nsjail_py.run(["/bin/true"], workdir=os.path.realpath(path))
    assert (os.stat(path).st_uid, os.stat(path).st_ctime) == (before.st_uid, before.st_ctime)


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a directory away")
@pytest.mark.parametrize("owner", ["root", "somebody"])
def test_root_follows_no_link_that_a_run_has_left_in_its_work_directory(owner: str, tmp_path: Path) -> None:
    work, other = tmp_path / "work", tmp_path / "other"
    work.mkdir()
    other.mkdir()
    if owner == "somebody":
        os.chown(work, 65534, 65534)
    nsjail_py.run_python(f"import os; os.symlink({str(other)!r}, '/work/out'); os.mkdir('/work/in')", workdir=str(work)).check()
    before = os.stat(other).st_uid
    shown = ({"workdir": f"{work}/out"}, {"mounts": [Mount(source=f"{work}/out", target="/data")]}, {"project": f"{work}/out"})
    for each in shown:
        with pytest.raises(nsjail_py.PolicyError, match="earlier run"):
            nsjail_py.run(["/bin/true"], **each)
    assert os.stat(other).st_uid == before
    (tmp_path / "ours").symlink_to("work")
    assert write("it", workdir=f"{tmp_path}/ours/in") == "written", "a link of root's leads on"


@pytest.mark.parametrize("field", ["workdir", "mounts", "project"])
def test_a_link_leads_each_run_where_it_leads_then(field: str, tmp_path: Path) -> None:
    shown, inside = str(tmp_path / "shown"), {"workdir": "/work", "mounts": "/data", "project": "/project"}[field]
    jail = Jail("moderate", **{field: [Mount(source=shown, target="/data")] if field == "mounts" else shown})
    for name in ("first", "second", "first"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "name").write_text(name)
        (tmp_path / "fresh").symlink_to(name)
        (tmp_path / "fresh").replace(shown)
        assert jail.run(["/bin/cat", f"{inside}/name"]).stdout.decode() == name
    (tmp_path / "shown").unlink()
    with pytest.raises(nsjail_py.PolicyError, match="No such file"):
        jail.run(["/bin/true"])


def test_a_source_may_be_a_file_now_and_a_directory_then(tmp_path: Path) -> None:
    shown, mounts = tmp_path / "shown", [Mount(source=str(tmp_path / "shown"), target="/data")]
    for make, remove in ((shown.touch, shown.unlink), (shown.mkdir, shown.rmdir)):
        make()
        assert nsjail_py.run(["/bin/ls", "-d", "/data"], policy="moderate", mounts=mounts).ok
        remove()


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a directory away")
def test_a_writable_source_is_its_owners_of_now(tmp_path: Path) -> None:
    """Root's own files are never the run's: there the permission bits decide."""
    (tmp_path / "shown").mkdir()
    mounts = [Mount(source=str(tmp_path / "shown"), target="/data", writable=True)]
    for owner, said in ((0, ""), (65534, "written"), (0, "")):
        os.chown(tmp_path / "shown", owner, owner)
        assert write("/data/out", mounts=mounts) == said
        (tmp_path / "shown" / "out").unlink(missing_ok=True)


@pytest.mark.parametrize(("root", "seen"), [("minimal", True), ("system", False), ("host", True)])
def test_a_program_in_opt_runs_under_every_root(root: str, seen: bool, in_opt: Path) -> None:
    program = shutil.copy("/bin/true", in_opt)
    jail = nsjail_py.Jail("untrusted", root=root)
    jail.run([program]).check()
    assert jail.compiled_for(program).program == (program if seen else "/app/true")
    (in_opt / "script").write_text("#!/bin/sh\necho $0\n")
    (in_opt / "script").chmod(0o755)
    result = nsjail_py.run([in_opt / "script"], policy="moderate", root=root).check()
    assert result.stdout.decode() == (f"{in_opt}/script\n" if seen else "/app/script\n")


@pytest.mark.parametrize("text", ["/canary", "../../../../../../canary", "{outside}", "/proc/self/root{outside}"])
def test_a_link_in_the_root_leads_no_target_out_of_it(text: str, tmp_path: Path) -> None:
    """A mount goes to a place below the link: it is found inside, or there is no jail. [bubblewrap CVE-2026-87766]"""
    outside, tree, other = (tmp_path / name for name in ("outside", "root/tree", "other"))
    for path in (outside, tree, other):
        path.mkdir(parents=True)
    (tree / "link").symlink_to(text.format(outside=outside))
    with pytest.raises(nsjail_py.SetupError) as refused:
        nsjail_py.run(["/bin/true"], policy="moderate", root=str(tree.parent), mounts=[Mount(source=str(other), target="/tree/link/new")])
    assert refused.value.step == "mount bind"
    assert refused.value.errno in (errno.ENOENT, errno.ELOOP)  # a link of /proc's own kind is not followed at all
    assert list(outside.iterdir()) == []
    assert not Path("/canary").exists()
