"""Bombs of each kind meet their limit, whoever counts, and ways around a clock lead nowhere.

Each is bounded by itself, far below what this machine has, and is shown to reach its bound outside.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT, PATIENCE
from ordinary import NOBODY, prepare

import nsjail_py
from nsjail_py import PIPE, Verdict, launcher, plan
from nsjail_py.why import why

from .runner import WALLS, Attack, inside, outside

M = 1 << 20
STARTED = pytest.mark.parametrize("start", ["", "/warm"], ids=["exec", "warm"])
HAS_CGROUP = launcher.current().claim.kind != "none"
TOUCH = "for i in range(0, len(m), 4096): m[i] = 1\nwon()"
SOCKETS = "pairs = [socket.socketpair() for _ in range(400)]\nfor end in [end for pair in pairs for end in pair]:\n  end.setblocking(False)\n  try:\n    for _ in range(200): end.send(bytes(65536))\n  except OSError: pass\nwon()"
TCP = "s = socket.create_server(('127.0.0.1', 0))\nheld, sent = [], 0\nwhile sent < 120 << 20 and len(held) < 600:\n  c = socket.create_connection(s.getsockname())\n  c.setblocking(False)\n  held += [c, s.accept()[0]]\n  try:\n    while sent < 120 << 20: sent += c.send(bytes(65536))\n  except BlockingIOError: pass\nif sent < 120 << 20: raise MemoryError\nwon()"

HELD = {"held": 0.0 if PATIENCE == 1 else 2.2}
"""Seconds. Where no control group counts, a look at many processes is dear on a slow machine, and up to a second passes before the next."""

# What is nobody's mapped memory needs a control group; where there is none, the result says so.
MEMORY: dict[str, tuple[str, str, bool]] = {
    "private": ("untrusted", "m = bytearray(120 << 20)\n" + TOUCH, False),
    "mapped": ("untrusted", "m = mmap.mmap(-1, 120 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n" + TOUCH, False),
    "in many small pieces": ("untrusted", "m = [bytes(1000) for _ in range(110_000)]\nwon()", False),
    "of threads' stacks": ("untrusted", "threading.stack_size(8 << 20)\nheld = threading.Event()\ndef deep():\n  m = bytearray(8 << 20)\n  held.wait(3)\nts = [threading.Thread(target=deep, daemon=True) for _ in range(14)]\n[t.start() for t in ts]\nheld.set()\nwon()", False),
    "grown by brk": ("untrusted", "libc.sbrk.restype = ctypes.c_long\nn = 0\nwhile n < 120 and libc.sbrk(ctypes.c_long(1 << 20)) != -1: n += 1\nlibc.memset(ctypes.c_void_p(libc.sbrk(ctypes.c_long(0)) - (n << 20)), 1, ctypes.c_size_t(n << 20))\nif n < 120: raise MemoryError\nwon()", False),
    "shared": ("untrusted", "m = mmap.mmap(-1, 120 << 20)\n" + TOUCH, False),
    "of a process whose first thread has ended": ("untrusted", "def hold():\n  m = mmap.mmap(-1, 120 << 20)\n  for i in range(0, len(m), 4096): m[i] = 1\n  time.sleep(1)\n  won()\n  os._exit(0)\nthreading.Thread(target=hold).start()\nlibc.syscall(60, 0)", False),
    # Won only if all six answer once the last has its share: a process that was killed for another's sake held it only before.
    "of many processes": ("moderate", "ps = []\nfor _ in range(6):\n  ours, theirs = socket.socketpair()\n  if os.fork() == 0:\n    ours.close()\n    [p.close() for p in ps]\n    try: m = bytearray(20 << 20); theirs.send(b'x'); theirs.recv(1); time.sleep(T['held']); theirs.send(b'y'); theirs.recv(1)\n    finally: os._exit(0)\n  theirs.close()\n  ps.append(ours)\nhad = [p.recv(1) for p in ps]\n[p.send(b'?') for p in ps]\nif had == [b'x'] * 6 and [p.recv(1) for p in ps] == [b'y'] * 6: won()", False),
    "in files in memory": ("moderate", "fd = os.memfd_create('m')\nfor _ in range(120): os.write(fd, bytes(1 << 20))\nwon()", True),
    "of System V": ("moderate", "i = call(29, 0, 120 << 20, 0o1600)\nlibc.shmat.restype = ctypes.c_long\na = libc.shmat(i, None, 0)\nlibc.shmctl(i, 0, None)\nlibc.memset(ctypes.c_void_p(a), 1, ctypes.c_size_t(120 << 20))\nwon()", False),
    "in sockets": ("moderate", SOCKETS, True),
    "in TCP's buffers": ("moderate", TCP, True),
}  # fmt: skip


@pytest.mark.parametrize("start", ["", "/stock", "/warm"], ids=["exec", "stock", "warm"])
@pytest.mark.parametrize("what", MEMORY)
def test_memory(what: str, start: str) -> None:
    """120 MiB of it are had outside, and not under a limit of 48."""
    level, source, unmapped = MEMORY[what]
    attack = Attack(what, source)
    outside(attack, HELD)
    limits: dict[str, Any] = {"memory": 48 * M, "disk": 8 * M, "open_files": 1000, "cpu_time": 2.0}
    result = inside(attack, level + start, HELD, **limits)
    if unmapped and not HAS_CGROUP:
        lacks = {p.name for p in result.protections if p.state == "unavailable"}
        assert "cgroup" in lacks
        return
    assert b"WON" not in result.stdout, result.summary
    assert (
        result.verdict is Verdict.memory or b"HELD" in result.stdout or result.verdict in (Verdict.exit, Verdict.signal, Verdict.cpu_time)
    ), result.summary
    if HAS_CGROUP:
        assert result.peak_memory <= 49 * M


TABLES = "size = T['gib'] << 30\nm = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, mmap.PROT_READ)\nm.madvise(15)\nfor at in range(0, size, 2 << 20): m[at]\ntime.sleep(0.3 + T['held'])\nwon()"  # fmt: skip


@STARTED
def test_page_tables_count(start: str) -> None:
    """A page that is only read is the kernel's own page of zeros: it takes an entry in a table, of which each 2 MiB need 4 KiB."""
    attack = Attack("page tables", TABLES)
    outside(attack, HELD | {"gib": 1})
    result = inside(attack, f"untrusted{start}", HELD | {"gib": 60}, memory=48 * M, cpu_time=5.0)
    assert b"WON" not in result.stdout and result.verdict is Verdict.memory, result.summary


MANY_GROUPS = "import mmap, time\nm = mmap.mmap(-1, 120 << 20)\nfor i in range(0, len(m), 4096): m[i] = 1\ntime.sleep(1)"


@pytest.mark.skipif(not IS_ROOT, reason="only root gives somebody groups")
def test_a_user_of_many_groups_has_the_same_limit(place: Path) -> None:
    """They stand in the kernel's file on a process before its memory."""
    prepare(place)
    done = subprocess.run(
        [place / "user/venv/bin/python", "-c", f"import nsjail_py; print(nsjail_py.run_python({MANY_GROUPS!r}, memory='48M').verdict)"],
        user=NOBODY,
        group=NOBODY,
        extra_groups=range(2_000_000_000, 2_000_001_000),
        cwd=place / "user",
        env={"HOME": str(place / "user"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "memory\n", done.stderr


HUGE = "if call() == -1 and ctypes.get_errno() == errno.EPERM: raise PermissionError\nwon()"
HUGE_PAGES = {
    "mmap": "call = lambda: -1 if libc.mmap(None, ctypes.c_size_t(2 << 20), 3, 0x40022, -1, ctypes.c_long(0)) == -1 else 0\n",
    "memfd_create": "call = lambda: libc.memfd_create(b'm', 4)\n",
    "shmget": "def call():\n  i = libc.shmget(0, ctypes.c_size_t(2 << 20), 0o5600)\n  return i if i == -1 else libc.shmctl(i, 0, None)\n",
}  # fmt: skip


@STARTED
@pytest.mark.parametrize("level", ["untrusted", "moderate"])
@pytest.mark.parametrize("name", HUGE_PAGES)
def test_huge_pages_which_no_limit_counts_are_refused_and_counted(name: str, level: str, start: str) -> None:
    """Outside they are to be had as far as the host's pool goes, which mostly is empty: the answer is any but EPERM. Newer kernels have a
    right for SHM_HUGETLB."""
    attack = Attack(name, HUGE_PAGES[name] + HUGE)
    if IS_ROOT or name != "shmget":
        outside(attack)
    result = inside(attack, level + start)
    assert b"HELD PermissionError" in result.stdout and result.denied == {name: 1}, (result.summary, result.stdout)


STRONG: dict[str, tuple[str, str, dict[str, Any]]] = {
    "threads": ("untrusted", "held = threading.Event()\nn = 0\ntry:\n  for n in range(60): threading.Thread(target=held.wait, args=(5,), daemon=True).start()\n  won()\nfinally: held.set()", {"processes": 16}),
    "processes": ("moderate", "n = [os.fork() or time.sleep(1) or os._exit(0) for _ in range(60)]\nwon()", {"processes": 16}),
    "processes that are not waited for": ("moderate", "for _ in range(60):\n  if os.fork() == 0: os._exit(0)\nwon()", {"processes": 16}),
    "generations of processes": ("moderate", "for generation in range(40):\n  if os.fork(): time.sleep(0.4); os._exit(0)\nwon()", {"processes": 16}),
    "bytes in a file": ("untrusted", "fd = os.open(f'/tmp/big-{os.getpid()}', os.O_CREAT | os.O_WRONLY, 0o600)\ntry:\n  for _ in range(24): os.write(fd, bytes(1 << 20))\n  won()\nfinally: os.unlink(f'/tmp/big-{os.getpid()}')", {"disk": 8 * M}),
    "bytes in one file where each is limited": ("untrusted", "signal.signal(25, signal.SIG_IGN)\nfd = os.open(f'/tmp/one-{os.getpid()}', os.O_CREAT | os.O_WRONLY, 0o600)\ntry:\n  n = 0\n  for _ in range(24): n += os.write(fd, bytes(1 << 20))\n  if n == 24 << 20: won()\nfinally: os.unlink(f'/tmp/one-{os.getpid()}')", {"file_size": 2 * M}),
    "bytes by fallocate": ("untrusted", "fd = os.open(f'/tmp/fall-{os.getpid()}', os.O_CREAT | os.O_WRONLY, 0o600)\ntry: os.posix_fallocate(fd, 0, 24 << 20); won()\nfinally: os.unlink(f'/tmp/fall-{os.getpid()}')", {"disk": 8 * M}),
    "bytes in three places": ("untrusted", "held = []\ntry:\n  for top in ('/tmp', '/dev/shm', '.' if os.access('.', os.W_OK) else '/tmp/.'):\n    held.append(f'{top}/part{len(held)}-{os.getpid()}')\n    open(held[-1], 'wb').write(bytes(6 << 20))\n  won()\nfinally: [os.unlink(h) for h in held if os.path.exists(h)]", {"disk": 8 * M}),
    "bytes in unlinked files": ("untrusted", "held = []\nfor n in range(24):\n  held.append(os.open(f'/tmp/u{n}-{os.getpid()}', os.O_CREAT | os.O_RDWR, 0o600))\n  os.unlink(f'/tmp/u{n}-{os.getpid()}')\n  os.write(held[-1], bytes(1 << 20))\nwon()", {"disk": 8 * M}),
    "files": ("untrusted", "import shutil\ntop = f'/tmp/many-{os.getpid()}'\nos.mkdir(top)\ntry:\n  for n in range(900): os.close(os.open(f'{top}/{n}', os.O_CREAT, 0o600))\n  won()\nfinally: shutil.rmtree(top)", {"files": 300}),
    "links": ("untrusted", "import shutil\ntop = f'/tmp/links-{os.getpid()}'\nos.mkdir(top)\ntry:\n  for n in range(900): os.symlink('x', f'{top}/{n}')\n  won()\nfinally: shutil.rmtree(top)", {"files": 300}),
    "descriptors": ("untrusted", "held = [os.dup(0) for _ in range(200)]\nwon()", {"open_files": 64}),
    "pipes": ("untrusted", "held = [os.pipe() for _ in range(100)]\nwon()", {"open_files": 64}),
    "output": ("untrusted", "for _ in range(3000): os.write(1, bytes(1000))\nos.write(1, b'WON')", {"output": 1 * M}),
    "output and errors": ("untrusted", "for _ in range(1500): os.write(1, bytes(1000)); os.write(2, bytes(1000))\nos.write(1, b'WON')", {"output": 2 * M}),
    "locked memory": ("untrusted", "m = mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nbuf = (ctypes.c_char * (8 << 20)).from_buffer(m)\nif libc.mlock(buf, 1 << 18) == 0: won()", {}),
    "pending signals": ("untrusted", "signal.pthread_sigmask(signal.SIG_BLOCK, [40])\nfor _ in range(400): call(129, os.getpid(), 40, struct.pack('iiiiii', 40, 0, -1, 0, 0, 0) + bytes(104))\nwon()", {}),
    "queued messages": ("moderate", "for n in range(4):\n  name = f'q{n}-{os.getpid()}'.encode()\n  call(240, name, 0o102, 0o600, struct.pack('8q', 0, 10, 8192, 0, 0, 0, 0, 0))\n  call(241, name)\nwon()", {}),
    "stack": ("untrusted", "import resource\nif resource.getrlimit(resource.RLIMIT_STACK)[0] not in range(0, 3 << 20): won()", {"stack": 2 * M}),
    "a core file": ("untrusted", "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (2, 2)) if T.get('inside') else won()\nwon()", {}),
}  # fmt: skip


@STARTED
@pytest.mark.parametrize("what", STRONG)
def test_no_more_than_its_limit_of(what: str, start: str) -> None:
    level, source, limits = STRONG[what]
    if what == "locked memory" and not IS_ROOT:
        source = source.replace("1 << 18", "1 << 17")  # outside a user may lock 8 MiB, inside 64 KiB
    outside(Attack(what, source))
    result = inside(Attack(what, source), level + start, {"inside": True}, **limits)
    assert b"WON" not in result.stdout, result.summary
    assert b"DONE" not in result.stdout or what in ("locked memory", "stack"), result.summary
    assert len(result.stdout) + len(result.stderr) <= 2 * M + 65536


BURN = "def burn(seconds):\n  end = time.process_time() + seconds\n  while time.process_time() < end: pass\n"
CLOCKS: dict[str, tuple[str, str]] = {
    "one thread": ("untrusted", BURN + "burn(1.2)\nwon()"),
    "many threads": ("untrusted", BURN + "ts = [threading.Thread(target=burn, args=(1.2,)) for _ in range(4)]\n[t.start() for t in ts]\n[t.join() for t in ts]\nwon()"),
    "ignored signals": ("untrusted", BURN + "for n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nburn(1.2)\nwon()"),
    "closed streams": ("untrusted", BURN + "out = os.dup(1)\nfor fd in (0, 1, 2): os.close(fd)\nburn(1.2)\nos.write(out, b'WON')"),
    "raised limits": ("untrusted", BURN + "import resource\ntry: resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)\nexcept (OSError, ValueError): pass\nburn(1.2)\nwon()"),
    "a child": ("moderate", BURN + "if os.fork() == 0: burn(1.2); won(); os._exit(0)\nos.wait()"),
    "a session of its own": ("moderate", BURN + "if os.fork() == 0: os.setsid(); burn(1.2); won(); os._exit(0)\ntime.sleep(3)"),
    "a double fork": ("moderate", BURN + "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: burn(1.2); won()\n  os._exit(0)\ntime.sleep(3)"),
    "processes side by side": ("moderate", BURN + "for _ in range(4):\n  if os.fork() == 0: burn(0.4); os._exit(0)\nfor _ in range(4): os.wait()\nwon()"),
}  # fmt: skip
TOGETHER = {
    "many short-lived children": BURN + "for _ in range(60):\n  if os.fork() == 0: burn(0.02); os._exit(0)\n  os.wait()\nwon()",
    "children that nobody waits for": BURN + "signal.signal(17, signal.SIG_IGN)\nfor _ in range(60):\n  if os.fork() == 0: burn(0.02); os._exit(0)\n  time.sleep(0.01)\ntime.sleep(0.3)\nwon()",
}  # fmt: skip


@STARTED
@pytest.mark.parametrize("way", CLOCKS)
def test_processor_time_is_not_evaded_by(way: str, start: str) -> None:
    level, source = CLOCKS[way]
    outside(Attack(way, source))
    result = inside(Attack(way, source), level + start, cpu_time=0.3)
    assert result.verdict is Verdict.cpu_time and b"WON" not in result.stdout, (result.summary, result.stdout)
    assert result.cpu_time < 0.7 * PATIENCE


@STARTED
@pytest.mark.parametrize("way", TOGETHER)
def test_processor_time_of_what_has_ended_counts(way: str, start: str) -> None:
    """With a control group at once; without, at the latest when the run ends, and never beyond the wall clock."""
    outside(Attack(way, TOGETHER[way]))
    result = inside(Attack(way, TOGETHER[way]), "moderate" + start, wall_time=4.0, cpu_time=0.3)
    if HAS_CGROUP:
        assert result.verdict is Verdict.cpu_time and b"WON" not in result.stdout and result.cpu_time < 0.7 * PATIENCE, result.summary
    else:
        assert result.wall_time < 5 * PATIENCE and "cgroup" in {p.name for p in result.protections if p.state == "unavailable"}


SHARED_BY_MANY = """
import os, sys
m = bytearray(300 << 20)
for i in range(0, len(m), 4096): m[i] = 1
for _ in range(40):
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_run_whose_memory_is_dear_to_look_at_does_not_keep_others_waiting() -> None:
    """Without a control group all page tables of its processes are read for it, by the launcher that all runs share."""

    def median() -> float:
        taken = []
        for _ in range(15):
            began = time.monotonic()
            nsjail_py.run(["/bin/true"]).check()
            taken.append(time.monotonic() - began)
            time.sleep(0.02)
        return sorted(taken)[7]

    quiet = median()
    jail = nsjail_py.Jail("moderate", memory=512 * M, processes=64)
    with jail.start_python(SHARED_BY_MANY, stdin=nsjail_py.PIPE, stdout=nsjail_py.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        assert median() < max(10 * quiet, 0.05)
        assert process.poll() is None, "what they share is counted once"


NEARLY_SPENT = """
import os, sys, time
children = []
for _ in range(60):
    children.append(os.fork())
    if not children[-1]:
        os.read(0, 1)
        os._exit(0)
time.sleep(0.1)
until = float(sys.argv[1]) - sum(time.clock_gettime(~child << 3 | 2) for child in children)
while time.process_time() < until: pass
print("ready", flush=True)
os.read(0, 1)
"""


def test_a_run_that_has_nearly_spent_its_time_does_not_have_the_launcher_look_without_a_pause() -> None:
    """Without a control group a look is one at each process, and little is left until the next one is due."""
    launcher_stat = Path(f"/proc/{launcher.current().pid}/stat")

    def worked() -> float:
        return sum(map(int, launcher_stat.read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    jail = nsjail_py.Jail("moderate", processes=64, cpu_time=PATIENCE, wall_time=30 * PATIENCE)
    for left in (0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064):
        with jail.start_python(NEARLY_SPENT, args=[str(PATIENCE - left)], stdin=nsjail_py.PIPE, stdout=nsjail_py.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            before = worked()
            time.sleep(1)
            after = worked()
            if process.poll() is None:
                break
    else:
        pytest.fail("it had spent it all")
    assert after - before < (0.2 if PATIENCE == 1 else 0.4)  # it is all of the second without a pause, and two elevenths with it


STALLS = {
    "sleep": "time.sleep(30)",
    "a stop": "os.kill(os.getpid(), signal.SIGSTOP)",
    "a stopped child": "if os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)\nos.wait()",
    "ignored signals": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ntime.sleep(30)",
    "closed streams": "for fd in (0, 1, 2): os.close(fd)\ntime.sleep(30)",
    "a read of nothing": "r, w = os.pipe()\nos.read(r, 1)",
    "a lock on itself": "import fcntl\nl = threading.Lock()\nl.acquire()\nl.acquire()",
}  # fmt: skip


@STARTED
@pytest.mark.parametrize("way", STALLS)
def test_wall_time_is_not_evaded_by(way: str, start: str) -> None:
    """Outside such a program is still there after the time; inside it is gone."""
    from .runner import PRELUDE, canary_process, stop

    stalled = subprocess.Popen(
        [sys.executable, "-c", PRELUDE, "{}", STALLS[way]], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    canary = canary_process()
    try:
        result = inside(Attack(way, STALLS[way]), f"moderate{start}", wall_time=0.3)
        assert stalled.poll() is None
        assert result.verdict is Verdict.wall_time and result.wall_time < 1.5 * PATIENCE
    finally:
        stop(canary)
        os.killpg(stalled.pid, signal.SIGKILL)
        stalled.wait()


GENERATIONS, CHAINS = 24, 3
ROLL = f"""
import os, sys, time
ours, theirs = map(int, sys.argv[1:])
for turn in range({GENERATIONS}):
    os.write(theirs, b".")
    if turn < 2: os.write(ours, b".")
    time.sleep(0.05)
    if os.fork(): os._exit(0)
    os.setsid()
"""
ROLLING = f"""
import os, subprocess, sys
read, write = os.pipe()
os.set_inheritable(write, True)
for _ in range({CHAINS}): subprocess.Popen([sys.executable, "-c", {ROLL!r}, str(write), sys.argv[1]], close_fds=False)
for _ in range(2 * {CHAINS}): os.read(read, 1)
"""


def test_rolling_forks_are_all_gone_when_the_run_is_over() -> None:
    """No list of processes is walked, which would lose against them: the namespace ends. Who is left has its end of a pipe."""
    end, its = os.pipe()
    result = nsjail_py.run_python(ROLLING, policy="moderate", args=[str(its)], pass_fds=[its], processes=40, wall_time=20 * PATIENCE)
    os.close(its)
    assert result.check() and select.select([end], [], [], 0)[0]
    written = os.read(end, 1000)
    assert 2 * CHAINS <= len(written) < GENERATIONS * CHAINS and select.select([end], [], [], 0)[0] and os.read(end, 1) == b""
    os.close(end)


def test_rolling_forks_go_on_where_nobody_ends_them() -> None:
    end, its = os.pipe()
    subprocess.run([sys.executable, "-c", ROLLING, str(its)], pass_fds=[its], check=True)
    os.close(its)
    written = b""
    while select.select([end], [], [], 20 * PATIENCE)[0] and (more := os.read(end, 1000)):
        written += more
    os.close(end)
    assert len(written) == GENERATIONS * CHAINS


def test_a_flood_of_denied_calls_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand; on a slow machine, where each takes milliseconds, fewer."""
    most = int(plan.MAX_DENIED / PATIENCE)
    monkeypatch.setattr(plan, "MAX_DENIED", most)
    source = "import ctypes\nl = ctypes.CDLL(None)\nfor i in range(400_000): l.ptrace(0, 0, 0, 0)\nprint('WON')"
    result = nsjail_py.run_python(source, hostname=f"flood-{most}", wall_time=60 * PATIENCE, cpu_time=60 * PATIENCE)
    assert result.verdict is Verdict.syscall and b"WON" not in result.stdout
    assert result.denied["ptrace"] >= most


def test_a_flood_of_many_different_denied_calls_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report names 48 of them; the others count as well."""
    monkeypatch.setattr(plan, "MAX_DENIED", 500)
    numbers = [*range(5000, 5048), *[9999] * 2000]
    source = f"import ctypes\nl = ctypes.CDLL(None)\nfor number in {numbers}: l.syscall(number)\nprint('WON')"
    result = nsjail_py.run_python(source, hostname="flood", wall_time=60 * PATIENCE)
    assert (result.verdict, result.stdout) == (Verdict.syscall, b"")
    assert result.denied["further calls"] == 501 - 48 and sum(result.denied.values()) == 501
    assert [denial.what for denial in why(result)][-1] == "further calls, 453 times"


WATCHES = """
import ctypes, os
l, held = ctypes.CDLL(None), []
while len(held) < 100 and (fd := l.inotify_init1(os.O_CLOEXEC)) >= 0: held.append(fd)
"""


def watches() -> int:
    """How many more of inotify's instances this user can have, of those that a program is let have."""
    told: dict[str, Any] = {}
    exec(WATCHES, told)
    for fd in told["held"]:
        os.close(fd)
    return len(told["held"])


def test_a_run_takes_no_watches_from_its_caller() -> None:
    """The kernel counts them for the user, and for the owner of each user namespace. An ordinary user's run has no other to count for."""
    before = watches()
    with nsjail_py.Jail("moderate").start_python(WATCHES + "print(len(held), flush=True)\ninput()", stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout and int(process.stdout.readline()) == 32
        assert watches() >= before - (0 if IS_ROOT else 32)


def test_a_run_takes_no_more_terminals_than_it_may() -> None:
    """All but the host's own come from one stock of 3,072."""
    source = "import os\ntry:\n  for n in range(100): os.open('/dev/ptmx', os.O_RDWR)\nexcept OSError as e: print(n, e.errno)"
    assert nsjail_py.run_python(source).check().stdout == f"64 {errno.ENOSPC}\n".encode()


TREES = {
    "deep": "for _ in range(600):\n  os.mkdir('d' * 200); os.chdir('d' * 200)",
    "without permission": "for n in range(50):\n  os.mkdir(f'm{n}'); open(f'm{n}/f', 'w'); os.chmod(f'm{n}', 0)",
    "of odd names": "for n in list(range(1, 47)) + list(range(48, 256)): open(bytes([n]) * 40 + b'\\n\\xff', 'w')",
    "full": "try:\n  f = open('full', 'wb')\n  while True: f.write(bytes(1 << 20))\nexcept OSError: pass",
}  # fmt: skip


@pytest.mark.parametrize("tree", TREES)
def test_whatever_tree_is_left_is_cleared_away(tree: str) -> None:
    """nothing_is_left (conftest.py) holds for these runs as for all; and the next run finds an empty directory."""
    for level in ("untrusted", "moderate"):
        result = inside(Attack(tree, TREES[tree]), level, disk=16 * M)
        assert b"DONE" in result.stdout, result.stdout
        assert inside(Attack("", "print(os.listdir('.'), os.listdir('/tmp'))"), level).stdout.endswith(b"[] []\n")


def test_swap_counts_as_memory_wherever_the_kernel_counts_it() -> None:
    """A limit on memory alone would let a program move out of it: both are set, or the result says that one is missing."""
    from nsjail_py.compiled import Host, _cgroup

    files = {kind: {write.file for write in _cgroup(WALLS["untrusted"], Host(kind, "", True, True, 7))} for kind in ("v1", "v2")}
    assert {"memory.limit_in_bytes", "memory.memsw.limit_in_bytes"} <= files["v1"]
    assert {"memory.max", "memory.swap.max"} <= files["v2"]
    result = nsjail_py.run(["/bin/true"])
    assert {p.state for p in result.protections if p.name == "swap"} <= {"applied", "unavailable"}
