"""Who the program is, what it was given, and what it is shown of the machine: a user of its own without any right, and no more."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import IS_ROOT
from msgspec.structs import replace

import nsjail_py
from nsjail_py import PIPE, Jail, Mount, Unavailable

from .runner import EVERY_WALL, WALLS, Attack, cases, fails, held, inside, outside, status, warm, with_starts

STATUS = "print(open('/proc/self/status').read())"


def inside_status(wall: str) -> dict[str, str]:
    text = inside(Attack("", STATUS), wall).stdout.decode()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


@pytest.mark.parametrize("wall", with_starts(EVERY_WALL))
def test_no_right_is_left_in_any_of_the_five_sets(wall: str) -> None:
    found = inside_status(wall)
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert found["NoNewPrivs"] == "1"  # whether there is a filter or not
    assert found["Seccomp"] == ("2" if WALLS[wall.partition("/")[0]].syscalls else "0")
    assert found["Uid"].split() == found["Gid"].split() == ["1000"] * 4
    assert found["TracerPid"] == "0" and found["Threads"] == "1"


@pytest.mark.parametrize("wall", [*EVERY_WALL, "untrusted/warm", "moderate/warm"])
def test_no_host_right_stands_behind_its_user(wall: str) -> None:
    """One id is mapped, never 0; as root it is one that nothing else on the host has."""
    name, _, start = wall.partition("/")
    jail = warm(WALLS[name]) if start else Jail(WALLS[name])
    with jail.start_python("print('up', flush=True)\nimport time; time.sleep(30)", stdout=PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"up\n" and process.pid
        init = int(status(process.pid)["PPid"])
        for pid in (process.pid, init):
            found = status(pid)
            assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16} and found["NoNewPrivs"] == "1"
            uids = set(found["Uid"].split())
            assert uids == {str(os.getuid())} if not IS_ROOT else min(map(int, uids)) >= 1_900_000_000
            assert "0" not in uids and found["Groups"] == ("" if IS_ROOT else status("self")["Groups"])
        maps = [Path(f"/proc/{process.pid}/{name}_map").read_text().split() for name in ("uid", "gid")]
        assert all(len(one) == 3 and one[0] == "1000" and one[1] != "0" and one[2] == "1" for one in maps)
        assert Path(f"/proc/{process.pid}/setgroups").read_text() == "deny\n" or IS_ROOT


CHANGE = [
    Attack("becomes root", "os.setuid(0)\nwon()", EVERY_WALL, True),
    Attack("takes root's group", "os.setgid(0)\nwon()", EVERY_WALL, True),
    Attack("becomes another", "libc.setresuid(-1, 0, -1) == 0 and won()\nos.setreuid(0, 0)", EVERY_WALL, True),
    Attack("raises a capability", "h = struct.pack('Ii', 0x20080522, 0)\ncall(126, h, struct.pack('6I', 1 << 21, 1 << 21, 0, 0, 0, 0))\nwon()", EVERY_WALL, True),
    Attack("lowers its nice value", "os.setpriority(os.PRIO_PROCESS, 0, -5)\nwon()" if IS_ROOT else "libc.prctl(23, 0) == 1 and won()", EVERY_WALL, True),
    Attack("gains a bounding capability", "if libc.prctl(23, 21) == 1: won()", EVERY_WALL, True),
]  # fmt: skip


@cases(CHANGE)
def test_it_never(attack: Attack, wall: str) -> None:
    fails(attack, wall)


ROOT_ONLY = "open(T['file']).read()\nwon()"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660])
def test_roots_own_files_are_not_the_programs(mode: int, secret: Path) -> None:
    """Even when the policy shows them: root outside never means root's files inside. Without root, the owner is the user himself."""
    path = secret.parent / f"private-{mode:o}"
    path.write_text("s3cret")
    path.chmod(mode)
    outside(Attack("", ROOT_ONLY), {"file": str(path)})
    for wall in ("untrusted", "moderate", "trusted", "bare"):
        result = inside(Attack("", ROOT_ONLY), wall, {"file": "/data"}, mounts=[Mount(source=str(path), target="/data")])
        assert (b"WON" in result.stdout) is not IS_ROOT, wall
    path.unlink()


def test_two_runs_at_once_have_different_users_and_names() -> None:
    """Else one's limits would be the other's, and their files."""
    with Jail("untrusted").start_python("input()", stdin=PIPE) as one, Jail("untrusted").start_python("input()", stdin=PIPE) as two:
        users = {status(pid)["Uid"] for pid in (one.pid, two.pid) if pid}
        spaces = {
            os.readlink(f"/proc/{pid}/ns/{name}") for pid in (one.pid, two.pid) for name in ("user", "pid", "mnt", "net", "ipc", "uts")
        }
        assert len(users) == (2 if IS_ROOT else 1) and len(spaces) == 12


def test_a_policy_that_insists_gets_everything_or_an_error() -> None:
    strict = replace(WALLS["untrusted"], best_effort=())
    lacks = {p.name for p in nsjail_py.run(["/bin/true"], policy="untrusted").protections if p.state == "unavailable"}
    if lacks:
        with pytest.raises(Unavailable, match=lacks.pop()):
            nsjail_py.run(["/bin/true"], policy=strict)
    else:
        assert nsjail_py.run(["/bin/true"], policy=strict).ok


# What it was given.

LEAKS = Attack("", "for fd in range(3, 1100):\n  try: os.fstat(fd)\n  except OSError: continue\n  won(fd)")


@pytest.fixture
def leaked() -> Iterator[list[int]]:
    """What a careless caller leaves open and inheritable: a file, a directory, sockets, a pipe, at low and at high numbers."""
    ends = [
        *os.pipe(),
        os.open("/etc/passwd", os.O_RDONLY),
        os.open("/", os.O_RDONLY),
        *(s.detach() for s in socket.socketpair()),
        os.memfd_create("secret"),
    ]
    ends += [os.dup2(ends[2], number) for number in (100, 555, 999, 1001) if not os.path.lexists(f"/proc/self/fd/{number}")]
    for descriptor in ends:
        os.set_inheritable(descriptor, True)
    yield ends
    for descriptor in ends:
        os.close(descriptor)


@pytest.mark.parametrize("wall", with_starts(EVERY_WALL))
def test_no_descriptor_crosses(wall: str, leaked: list[int]) -> None:
    outside(LEAKS, {}, close_fds=False)
    held(inside(LEAKS, wall))
    listed = inside(Attack("", "print(sorted(map(int, os.listdir('/proc/self/fd'))))"), wall).stdout
    assert b"[0, 1, 2, 3]" in listed.splitlines()  # 3 is the directory being listed


@pytest.mark.parametrize("wall", with_starts(EVERY_WALL))
def test_no_variable_crosses(wall: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Attack(
        "",
        "for p in os.listdir('/proc'):\n  try:\n    if 's3cret-variable' in open(f'/proc/{p}/environ').read(): won(p)\n  except OSError: pass\nif 's3cret-variable' in str(os.environ): won()",
    )
    monkeypatch.setenv("SECRET", "s3cret-variable")
    monkeypatch.setenv("LD_PRELOAD_", "s3cret-variable")
    outside(look)
    held(inside(look, wall))


def test_signals_are_as_new_whatever_the_caller_ignores() -> None:
    shown = ["/bin/cat", "/proc/self/status"]
    ignored = [signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    code = f"import nsjail_py, signal, subprocess\nfor n in {[int(n) for n in ignored]}: signal.signal(n, signal.SIG_IGN)\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nprint(subprocess.run({shown}, capture_output=True, restore_signals=False).stdout.decode())\nprint('----')\nprint(nsjail_py.run({shown}, policy='moderate').check().stdout.decode())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    careless, clean = (
        {line.split(":")[0]: line.split()[-1] for line in half.splitlines() if line.startswith("Sig")} for half in done.stdout.split("----")
    )
    assert int(careless["SigIgn"], 16) and int(careless["SigBlk"], 16)
    assert {int(clean[name], 16) for name in ("SigIgn", "SigBlk", "SigCgt")} == {0}


PLACE = """
import json, os, subprocess, sys
from nsjail_py import PIPE, Jail
def place(pid, personality):
    disk = subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True, check=True).stdout.strip()
    spared = int(open(f"/proc/{pid}/oom_score_adj").read())
    nice = os.getpriority(os.PRIO_PROCESS, pid)
    print(json.dumps([personality, os.sched_getscheduler(pid), disk, spared, nice]))
ask = "import ctypes; print(ctypes.CDLL(None).personality(0xffffffff), flush=True)"
place(os.getpid(), subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout.strip())
policy, _, start = sys.argv[1].partition("/")
with Jail(policy, stock=1, preload=[] if start == "warm" else None) as jail:
    for _ in range(2 if start == "stock" else 1):
        with jail.start_python(f"{ask}; input()", stdin=PIPE, stdout=PIPE) as process:
            place(process.pid, process.stdout.readline().decode().strip())
"""
HIGHER = {
    "addresses that are not random": ["setarch", "-R"],
    "a priority above others'": [
        sys.executable,
        "-c",
        "import os, sys; os.setpriority(os.PRIO_PROCESS, 0, -5); os.execvp(sys.argv[1], sys.argv[1:])",
    ],
    "real-time scheduling": ["chrt", "-r", "1"],
    "the real-time class for disks": ["ionice", "-c", "1", "-n", "4"],
    "being spared when memory runs out": ["choom", "-n", "-500", "--"],
}
LOWER = {
    "a priority below others'": ["nice", "-n", "7"],
    "the idle class for disks": ["ionice", "-c", "3"],
    "being the first to go when memory runs out": ["choom", "-n", "500", "--"],
}


@functools.cache
def places(wall: str, *command: str) -> tuple[list[object], list[object]]:
    """The caller's place and the program's: personality, scheduling, I/O class, OOM score, nice value."""
    done = subprocess.run([*command, sys.executable, "-c", PLACE, wall], capture_output=True, text=True, check=True)
    ours, *theirs = map(json.loads, done.stdout.splitlines())
    assert theirs == theirs[:1] * len(theirs)
    return ours, theirs[0]


def refused(command: list[str]) -> bool:
    return subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("wall", ["untrusted", "untrusted/stock", "untrusted/warm", "trusted"])
@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.elsewhere(refused(HIGHER[what]), why=f"{what}: not for this user")) for what in HIGHER]
)
def test_the_program_has_no_place_above_others_whatever_its_caller_has(what: str, wall: str) -> None:
    (ordinary, before), (ours, theirs) = places(wall), places(wall, *HIGHER[what])
    assert ours != ordinary
    assert theirs == (before if what != "a priority above others'" else [*before[:-1], 0])


@pytest.mark.parametrize("what", LOWER)
def test_the_program_is_no_better_off_than_its_caller(what: str) -> None:
    ordinary, _ = places("untrusted")
    ours, theirs = places("untrusted", *LOWER[what])
    assert ours != ordinary and theirs == ours


def test_nothing_of_init_is_ours() -> None:
    """Seen from outside, where it can be read: init's environment and descriptors are empty of the caller's."""
    with Jail("trusted").start_python("input()", stdin=PIPE) as process:
        init = int(status(process.pid or 0)["PPid"])
        if IS_ROOT:
            assert Path(f"/proc/{init}/environ").read_bytes() == b""
            names = [os.readlink(f"/proc/{init}/fd/{fd}") for fd in os.listdir(f"/proc/{init}/fd")]
            assert (
                all(name.startswith(("socket:", "pipe:", "anon_inode:", "/")) and "passwd" not in name for name in names)
                and len(names) <= 5
            )
        else:
            with pytest.raises(PermissionError):
                Path(f"/proc/{init}/environ").read_bytes()


def test_address_space_is_not_what_limits_memory() -> None:
    """Runtimes that reserve much and use little would fail: RLIMIT_AS stays as it was."""
    result = nsjail_py.run_python("import resource; print(resource.getrlimit(resource.RLIMIT_AS) == (resource.RLIM_INFINITY,) * 2)")
    assert result.check().stdout == b"True\n"


def test_many_threads_of_a_caller_get_jails_of_their_own() -> None:
    seen: list[bytes] = []
    threads = [
        threading.Thread(target=lambda n=n: seen.append(nsjail_py.run_python("print(input())", input=str(n).encode()).stdout))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [f"{n}\n".encode() for n in range(6)]


# What it is shown of the machine.

TELLING = ("kcore", "kmsg", "keys", "key-users", "kallsyms", "interrupts", "iomem", "ioports", "config.gz", "timer_list", "sysrq-trigger", "modules", "slabinfo", "vmallocinfo", "bus", "irq", "acpi", "scsi", "fs")  # fmt: skip


@pytest.mark.parametrize("wall", with_starts(EVERY_WALL))
def test_files_of_proc_that_tell_about_the_host_are_empty(wall: str) -> None:
    look = Attack(
        "",
        f"for name in {TELLING!r}:\n  path = '/proc/' + name\n  try:\n    if os.path.isdir(path) and os.listdir(path): won(name)\n    elif not os.path.isdir(path) and (os.read(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 64) if name != 'sysrq-trigger' else os.stat(path).st_mode & 0o222 and not stat.S_ISCHR(os.stat(path).st_mode)): won(name)\n  except OSError: pass",
    )
    outside(look)
    held(inside(look, wall))


@pytest.mark.parametrize("wall", with_starts(EVERY_WALL))
def test_no_setting_of_the_kernel_can_be_written(wall: str) -> None:
    attack = Attack(
        "",
        "for top, _, files in os.walk('/proc/sys'):\n  for name in files:\n    try: os.close(os.open(f'{top}/{name}', os.O_WRONLY)); won(f'{top}/{name}')\n    except OSError: pass",
        (),
        True,
    )
    outside(attack)
    held(inside(attack, wall))


@pytest.mark.parametrize("wall", with_starts(EVERY_WALL))
def test_no_device_but_the_harmless_five(wall: str) -> None:
    look = Attack(
        "",
        "for top, _, files in os.walk('/dev'):\n  for name in files:\n    path = f'{top}/{name}'\n    mode = os.lstat(path).st_mode\n    if (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and path not in ('/dev/null', '/dev/zero', '/dev/full', '/dev/random', '/dev/urandom', '/dev/ptmx', '/dev/pts/ptmx'): won(path)",
    )
    outside(look)
    held(inside(look, wall))


@pytest.mark.parametrize("wall", with_starts(EVERY_WALL))
def test_no_control_group_can_be_changed_or_left(wall: str) -> None:
    """Outside it is shown on this process's own files only: opened for writing, and nothing written."""
    attack = Attack(
        "",
        "for top, folders, files in os.walk(T['top']):\n  for name in files:\n    if name in ('cgroup.procs', 'tasks', 'memory.max', 'memory.limit_in_bytes', 'pids.max', 'release_agent', 'notify_on_release'):\n      try: os.close(os.open(f'{top}/{name}', os.O_WRONLY)); won(top)\n      except OSError: pass\ntry: os.mkdir(T['top'] + '/x')\nexcept OSError: pass\nelse: won('made')",
    )
    if IS_ROOT:
        outside(attack._replace(source=attack.source.split("\ntry: os.mkdir")[0]), {"top": "/sys/fs/cgroup"})
    held(inside(attack, wall, {"top": "/sys/fs/cgroup"}))
