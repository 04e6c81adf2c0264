"""What is not stopped, as docs/threat-model.md says it: the attack wins inside, and where a level holds it, that is shown too.

A kernel that holds one of these by itself makes its test fail. Then the document can promise more.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import nsjail_py
from nsjail_py import PIPE, Jail, Mount, Result

from .runner import LEVELS, Attack, fails, inside, outside


def wins(result: Result) -> None:
    assert b"WON" in result.stdout, result.summary


@pytest.fixture
def given() -> Iterator[Path]:
    """A directory of the caller's with a file, a pipe and a socket."""
    top = Path(tempfile.mkdtemp(prefix="canary-"))
    top.chmod(0o755)
    (top / "file").write_text("some bytes")
    (top / "file").chmod(0o644)
    os.mkfifo(top / "pipe")
    (top / "pipe").chmod(0o666)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(top / "socket"))
        server.listen()
        (top / "socket").chmod(0o777)
        yield top
    subprocess.run(["rm", "-rf", str(top)], check=True)


# A pipe or a socket in a directory that is shown read-only: the kernel asks the inode and not the mount whether it may be written to.

WRITE_PIPE = Attack("", "os.open(T['top'] + '/pipe', os.O_RDWR | os.O_NONBLOCK)\nwon()")
CONNECT = Attack("", "s = socket.socket(socket.AF_UNIX)\ns.connect(T['top'] + '/socket')\nwon()")


SPOKEN = pytest.mark.parametrize("attack", [WRITE_PIPE, CONNECT], ids=["pipe", "socket"])


@SPOKEN
def test_untrusted_does_not_speak_to_what_is_shown_read_only(attack: Attack, given: Path) -> None:
    fails(attack, "untrusted", {"top": str(given)}, {"top": "/data"}, mounts=[Mount(source=str(given), target="/data")])


@SPOKEN
@pytest.mark.parametrize("wall", ["moderate", "trusted"])
def test_moderate_and_trusted_speak_to_what_is_shown_read_only(attack: Attack, wall: str, given: Path) -> None:
    outside(attack, {"top": str(given)})
    wins(inside(attack, wall, {"top": "/data"}, mounts=[Mount(source=str(given), target="/data")]))


# Locks need no right to write: they meet the locks of the host on what is shown, and those of other runs on what all of them see.

LOCK = "import fcntl, os, sys\nfd = os.open({path!r}, os.O_RDONLY)\nfcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\nfcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)\nprint('locked', flush=True)\nsys.stdin.read(1)"


@pytest.mark.parametrize("level", LEVELS)
def test_a_file_that_is_shown_read_only_is_locked_for_the_host(level: str, given: Path) -> None:
    mounts = [Mount(source=str(given / "file"), target="/data")]
    with Jail(level, mounts=mounts).start_python(LOCK.format(path="/data"), stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        with open(given / "file", "r+b") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_two_runs_at_once_meet_in_a_lock_on_a_shared_file() -> None:
    lock = LOCK.format(path="/proc/self/exe")
    with Jail("untrusted").start_python(lock, stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        assert b"BlockingIOError" in nsjail_py.run_python(lock).stderr


def test_locks_on_own_files_meet_nobody() -> None:
    lock = LOCK.format(path="/work/own").replace("os.O_RDONLY", "os.O_RDWR | os.O_CREAT")
    with Jail("untrusted").start_python(lock, stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        assert nsjail_py.run_python(lock).check().stdout == b"locked\n"


# trusted has no filter. So it can end its own run without a result, and leave a file with a set-id bit of its own user.

SLAY = Attack("", "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (1000, 1000))\nwon()")
SET_ID = Attack("", "open('f', 'w')\nos.chmod('f', 0o4755)\nwon()")


@pytest.mark.parametrize("wall", LEVELS)
def test_only_trusted_sets_limits_for_its_init(wall: str) -> None:
    result = inside(SLAY, wall)
    assert (b"WON" in result.stdout) == (wall == "trusted"), result.summary
    assert wall == "trusted" or b"HELD PermissionError" in result.stdout


@pytest.mark.parametrize("wall", LEVELS)
def test_only_trusted_leaves_a_set_user_id_file_in_a_work_directory(wall: str) -> None:
    with tempfile.TemporaryDirectory(prefix="canary-work-") as top:
        os.chmod(top, 0o755)
        result = inside(SET_ID, wall, workdir=top)
        assert (b"WON" in result.stdout) == (wall == "trusted"), result.summary
        assert wall == "trusted" or not any(path.stat().st_mode & 0o6000 for path in Path(top).iterdir())
