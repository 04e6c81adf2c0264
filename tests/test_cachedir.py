"""The cache belongs to one user, shows whole files only, and forgets what nobody has used for a week."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import IS_ROOT

from nsjail_py import PIPE, Jail, SetupError, cachedir, run

LONG_AGO = time.time() - cachedir.UNUSED - 60


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("NSJAIL_PY_CACHE", str(path))
    return path


@pytest.fixture
def program(tmp_path: Path) -> str:
    """A program of our own, so that no other test has its plan in memory."""
    shutil.copy("/bin/sleep", tmp_path / "program")
    return str(tmp_path / "program")


def trees(base: Path) -> set[str]:
    return {path.name for path in (base / "roots").iterdir() if path.is_dir()}


def age(base: Path) -> None:
    for path in (base / "roots").iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO))


def test_the_cache_is_its_owners_alone(base: Path) -> None:
    assert cachedir.directory("roots") == base / "roots"
    assert [path.stat().st_mode & 0o777 for path in (base, base / "roots")] == [0o700, 0o700]


@pytest.mark.parametrize(
    "spoil",
    [lambda path: path.chmod(0o777), lambda path: (path.rmdir(), path.symlink_to("/tmp")), lambda path: (path.rmdir(), path.touch())],
)
def test_a_cache_that_others_could_write_is_refused(base: Path, spoil) -> None:
    spoil(cachedir.directory("roots"))
    with pytest.raises(SetupError, match="NSJAIL_PY_CACHE"):
        cachedir.directory("roots")


def on_noexec(top: Path, variable: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code where nothing below top may be executed."""
    user = [] if IS_ROOT else ["--user", "--map-root-user"]
    script = 'mount -t tmpfs -o noexec,mode=700 none "$0" && exec "$@"'
    command = ["unshare", *user, "--mount", "sh", "-c", script, str(top), sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "NSJAIL_PY_CACHE"} | {variable: str(top)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["roots", "images"])
def test_a_root_is_not_built_where_nothing_may_be_executed(kind: str, tmp_path: Path) -> None:
    code = f"from nsjail_py import cachedir; cachedir.directory('filters'); cachedir.directory({kind!r})"
    said = on_noexec(tmp_path, "NSJAIL_PY_CACHE", code).stderr.splitlines()[-1]
    assert f"cache directory ({tmp_path}/{kind} is on a file system that is mounted noexec" in said and "set NSJAIL_PY_CACHE" in said


def test_a_units_cache_where_nothing_may_be_executed_gives_way_to_var_tmp(tmp_path: Path) -> None:
    """DynamicUser=."""
    code = "import os; from nsjail_py import cachedir; print(cachedir._base()); os.environ['CACHE_DIRECTORY'] = '/var/tmp/unit'; print(cachedir._base())"
    said = on_noexec(tmp_path, "CACHE_DIRECTORY", code).stdout.split()
    assert said == ["/var/tmp/nsjail_py-0", "/var/tmp/unit/nsjail_py"]


def test_a_reader_sees_the_old_content_or_the_new(base: Path) -> None:
    path = cachedir.directory("notes") / "note"
    for data in (b"old", b"new" * 100_000):
        cachedir.write(path, data)
        assert path.read_bytes() == data
    path.unlink()
    path.mkdir()
    with pytest.raises(SetupError):
        cachedir.write(path, b"newer")
    assert list(path.parent.iterdir()) == [path]


def settled(tree: str) -> None:
    """Until the last jail that shows it, empty by now, is gone."""
    deadline = time.monotonic() + 5
    while tree in cachedir._mounts() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_what_nobody_used_for_a_week_goes_when_something_new_is_built(base: Path, program: str) -> None:
    run([program, "0"]).check()
    (tree,) = trees(base)
    settled(tree)
    age(base)
    run(["/bin/true"], env={"OWN": str(base)}).check()
    assert len(trees(base)) == 1 and tree not in trees(base)


@pytest.mark.parametrize("own", [True, False])
def test_a_root_that_was_removed_is_built_again(own: bool, base: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = program if own else "/bin/sleep"  # which all is in the root, so that the launcher keeps it
    run([name, "0"], env={"OWN": str(base)}).check()
    settled(*trees(base))
    shutil.rmtree(base)
    monkeypatch.setattr(cachedir, "AGAIN", 0.0)
    assert run([name, "0"], env={"OWN": str(base)}).check().ok and len(trees(base)) == 1


def test_what_was_used_stays(base: Path, program: str) -> None:
    run([program, "0"]).check()
    (tree,) = trees(base)
    assert cachedir.mark(base / "roots" / tree)
    cachedir.prune(base / "roots")
    assert trees(base) == {tree}


def test_a_root_that_a_jail_shows_stays_however_old_it_is(base: Path, program: str) -> None:
    with Jail("untrusted").start([program, "60"], stdout=PIPE) as process:
        assert process.pid
        (tree,) = trees(base)
        age(base)
        cachedir.prune(base / "roots")
        assert trees(base) == {tree}
        process.kill()
        process.wait()
    settled(tree)
    cachedir.prune(base / "roots")
    assert trees(base) == set()


def test_a_process_that_goes_on_using_a_root_marks_it_again(base: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run([program, "0"]).check()
    age(base)
    monkeypatch.setattr(cachedir, "AGAIN", 0.0)
    run([program, "0"]).check()
    cachedir.prune(base / "roots")
    assert len(trees(base)) == 1


def test_what_is_marked_in_the_moment_of_its_removal_stays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = cachedir.directory("roots") / "python-1"
    tree.mkdir()
    os.utime(tree, (LONG_AGO, LONG_AGO))
    monkeypatch.setattr(cachedir, "_mounts", lambda: (cachedir.mark(tree), "")[1])  # another process, at the worst time
    cachedir.prune(tree.parent)
    assert trees(base) == {"python-1"}
