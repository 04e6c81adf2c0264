"""Promises that are not kept yet. Each is an attack that wins: xfail is strict, so that a mend must take its mark away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT
from msgspec.structs import replace

import nsjail_py
from nsjail_py import PIPE, Jail, Mount, Verdict, compiled, launcher

from .runner import LEVELS, WALLS, Attack, fails, held, inside, outside

NO_CGROUP = launcher.current().claim.kind == "none"


def open_if(condition: bool, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(condition, reason=reason, strict=True)


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


# 1. The program's own user is the caller's where there is no root, and a descriptor of the caller's file leads to his own mount.


@pytest.mark.parametrize("wall", ["untrusted", pytest.param("moderate", marks=open_if(not IS_ROOT, "/proc/self/fd/0 is opened for writing")), pytest.param("trusted", marks=open_if(not IS_ROOT, "/proc/self/fd/0 is opened for writing"))])  # fmt: skip
def test_a_file_that_is_passed_for_reading_is_not_written(wall: str, given: Path) -> None:
    with open(given / "file", "rb") as file:
        held(inside(Attack("", "os.write(os.open('/proc/self/fd/0', os.O_WRONLY | os.O_TRUNC), b'changed')\nwon()"), wall, stdin=file))
    assert (given / "file").read_text() == "some bytes"


@pytest.mark.parametrize("wall", LEVELS)
@open_if(not IS_ROOT, "fchmod on a descriptor looks at the owner only")
def test_a_file_that_is_passed_for_reading_keeps_its_mode(wall: str, given: Path) -> None:
    with open(given / "file", "rb") as file:
        held(inside(Attack("", "os.fchmod(0, 0o600)\nwon()"), wall, stdin=file))


@pytest.mark.parametrize("wall", ["untrusted", pytest.param("moderate", marks=open_if(not IS_ROOT, "/proc/self/fd/1 is opened anew"))])
def test_a_log_that_is_passed_for_appending_is_not_cut(wall: str, given: Path) -> None:
    with open(given / "file", "ab") as log:
        inside(Attack("", "os.open('/proc/self/fd/2', os.O_WRONLY | os.O_TRUNC)\nwon()"), wall, stderr=log)
    assert (given / "file").read_text().startswith("some bytes")


# 2. A signal that the program sent itself passes for a limit that it reached.


@pytest.mark.parametrize("number", [signal.SIGXCPU, signal.SIGXFSZ, signal.SIGSYS])
@open_if(True, "the verdict looks at the signal and not at what was used")
def test_a_limit_that_was_not_reached_is_not_the_verdict(number: int) -> None:
    result = nsjail_py.run_python(f"import os, signal\nsignal.signal({int(number)}, signal.SIG_DFL)\nos.kill(os.getpid(), {int(number)})")
    assert (result.verdict, result.signal) == (Verdict.signal, number), result.summary


# 3. Without a control group the processor clock does not see children that were waited for, until the run is over.


@open_if(NO_CGROUP, "tree_cpu adds up processes that live; what they had from children is only in the final total")
def test_children_that_were_waited_for_count_at_once() -> None:
    burn = "e = time.process_time() + 0.02\n    while time.process_time() < e: pass\n    os._exit(0)"
    source = f"end = time.monotonic() + 2.5\nwhile time.monotonic() < end:\n  if os.fork() == 0:\n    {burn}\n  os.wait()\nwon()"
    outside(Attack("", source))
    result = inside(Attack("", source), "moderate", cpu_time=0.3)
    assert result.verdict is Verdict.cpu_time and b"WON" not in result.stdout and result.cpu_time < 1.0, result.summary


# 4. Without a filter the program gives init a limit of processor time, and its signals use it up: the run is "lost".

SLAY = "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (1, 1))\nend = time.monotonic() + 3\nwhile time.monotonic() < end:\n  try: os.kill(1, 17)\n  except OSError: break\nos.write(1, b'alive')"


@pytest.mark.parametrize(
    "wall", ["untrusted", "moderate", pytest.param("trusted", marks=open_if(True, "prlimit64 on init: same user, no right needed"))]
)
def test_init_s_limits_are_not_the_programs_to_set(wall: str) -> None:
    result = inside(Attack("", SLAY), wall)
    assert result.verdict is Verdict.ok and b"HELD PermissionError" in result.stdout


# 5. A pipe or socket that lies in a directory shown read-only can be written to: the kernel asks the inode, not the mount.

WRITE_PIPE = Attack("", "os.open(T['top'] + '/pipe', os.O_RDWR | os.O_NONBLOCK)\nwon()")
CONNECT = Attack("", "s = socket.socket(socket.AF_UNIX)\ns.connect(T['top'] + '/socket')\nwon()")


@pytest.mark.parametrize("wall", ["untrusted", *(pytest.param(wall, marks=open_if(True, "no Landlock at this level, and EROFS is not for pipes and sockets")) for wall in ("moderate", "trusted"))])  # fmt: skip
@pytest.mark.parametrize("attack", [WRITE_PIPE, CONNECT], ids=["pipe", "socket"])
def test_what_is_shown_read_only_is_not_spoken_to(attack: Attack, wall: str, given: Path) -> None:
    fails(attack, wall, {"top": str(given)}, {"top": "/data"}, mounts=[Mount(source=str(given), target="/data")])


# 6. Shared memory is nobody's private memory: without a control group nothing limits it.


@open_if(NO_CGROUP, "RLIMIT_DATA does not count what is shared")
def test_shared_memory_is_limited_without_a_control_group() -> None:
    held(inside(Attack("", "m = mmap.mmap(-1, 120 << 20)\nfor i in range(0, len(m), 4096): m[i] = 1\nwon()"), "untrusted", memory="48M"))


# 7. Landlock's second hand on noexec is open where programs may be executed at all: its rule for "/" is also one for /work.


@open_if(True, "execute on / holds for what lies below it, and rules only add")
def test_landlock_alone_refuses_what_was_written_where_other_programs_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    build = compiled.rootfs.build
    monkeypatch.setattr(compiled.rootfs, "build", lambda policy, *rest: build(replace(policy, exec_in_writable=True), *rest))
    source = "data = open('/proc/self/exe', 'rb').read()\nopen('/work/p', 'wb').write(data)\nos.chmod('/work/p', 0o755)\nif os.spawnv(os.P_WAIT, '/work/p', ['p', '-c', '0']) == 0: won()"
    held(inside(Attack("", source), replace(WALLS["no-filter"], hostname="landlock-finding")))


# 8. Two signals of the C library's start ignored: posix_spawn leaves them so, and signal(2) of the C library cannot set them back.


@open_if(True, "signal() goes by the C library, which refuses 32 and 33")
def test_no_signal_at_all_is_ignored() -> None:
    text = nsjail_py.run(["/bin/cat", "/proc/self/status"], policy="moderate").check().stdout.decode()
    assert next(line for line in text.splitlines() if line.startswith("SigIgn")).split()[1] == "0" * 16


# 9. Where there is no filter, only it would have kept set-user-id files out of a work directory.


@pytest.mark.parametrize(
    "wall", ["untrusted", "moderate", pytest.param("trusted", marks=open_if(True, "chmod is the owner's, and nosuid holds inside only"))]
)
def test_no_set_user_id_file_is_left_in_a_work_directory(wall: str) -> None:
    with tempfile.TemporaryDirectory(prefix="canary-work-") as top:
        os.chmod(top, 0o755)
        held(inside(Attack("", "open('f', 'w')\nos.chmod('f', 0o4755)\nwon()"), wall, workdir=top))


# 10. Locks are taken on files that are only shown: they meet the locks of other runs, and of the host.

LOCK = "import fcntl, os, sys\nfd = os.open({path!r}, os.O_RDONLY)\nfcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\nfcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)\nprint('locked', flush=True)\nsys.stdin.read(1)"


@pytest.mark.parametrize("level", LEVELS)
@open_if(True, "flock and read locks need no right to write")
def test_a_file_that_is_shown_read_only_is_not_locked_for_the_host(level: str, given: Path) -> None:
    import fcntl

    mounts = [Mount(source=str(given / "file"), target="/data")]
    with Jail(level, mounts=mounts).start_python(LOCK.format(path="/data"), stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        with open(given / "file", "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@open_if(True, "both see the same cached root, and its files have the same locks")
def test_two_runs_at_once_do_not_meet_in_a_lock_on_a_shared_file() -> None:
    lock = LOCK.format(path="/proc/self/exe")
    with Jail("untrusted").start_python(lock, stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        second = nsjail_py.run_python(lock.replace("sys.stdin.read(1)", ""))
        assert b"locked" in second.stdout, second.stderr


def test_a_lock_on_an_own_file_works() -> None:
    """Unmarked and last, so that what this file leaves behind is not taken for one of its findings."""
    lock = LOCK.format(path="/work/own").replace("os.O_RDONLY", "os.O_RDWR | os.O_CREAT")
    assert nsjail_py.run_python(lock).check().stdout == b"locked\n"
