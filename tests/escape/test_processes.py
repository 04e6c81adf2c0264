"""No process outside is seen, signalled, traced, read or slowed; and neither init nor the launcher can be used against us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import IS_ROOT, PATIENCE

import nsjail_py
from nsjail_py import PIPE, Jail, Verdict, launcher

from .runner import EVERY_WALL, SHOWN, Attack, alive, canary_process, cases, fails, held, inside, outside, status, stop, with_starts

# What may be done to a process of one's own user. T['pid'] is the victim outside, and init inside as well.

LOOK = [
    Attack("is not traced", "call(101, 16, T['pid'], 0, 0)\nwon()\nos.waitpid(T['pid'], 0x40000000)\ncall(101, 17, T['pid'], 0, 0)"),
    Attack("is not seized", "call(101, 0x4206, T['pid'], 0, 0)\nwon()"),
    Attack("shows no memory", "maps = open(f'/proc/{T[\"pid\"]}/maps').read()\nos.pread(os.open(f'/proc/{T[\"pid\"]}/mem', os.O_RDONLY), 8, int(maps.split('-')[0], 16))\nwon()"),
    Attack("shows no memory by address", "b = ctypes.create_string_buffer(16)\nmaps = open(f'/proc/{T[\"pid\"]}/maps').read() if T['outside'] else '400000-'\nlocal = struct.pack('QQ', ctypes.addressof(b), 8)\nremote = struct.pack('QQ', int(maps.split('-')[0], 16), 8)\ncall(310, T['pid'], local, 1, remote, 1, 0)\nwon()"),
    Attack("shows no environment", "if b'CANARY' in open(f'/proc/{T[\"pid\"]}/environ', 'rb').read(): won()"),
    Attack("shows no layout of its memory", "if open(f'/proc/{T[\"pid\"]}/maps').read(): won()"),
    Attack("shows no descriptors", "if os.listdir(f'/proc/{T[\"pid\"]}/fd'): won()"),
    Attack("shows no program", "os.readlink(f'/proc/{T[\"pid\"]}/exe')\nwon()"),
    Attack("shows no root", "os.stat(f'/proc/{T[\"pid\"]}/root/.')\nwon()"),
    Attack("shows no system call", "open(f'/proc/{T[\"pid\"]}/syscall').read()\nwon()"),
    Attack("hands over no descriptor", "call(438, os.pidfd_open(T['pid']), 0, 0)\nwon()"),
    Attack("is not compared", "if call(312, os.getpid(), T['pid'], 1, 0, 0) >= 0: won()"),
    Attack("has no name that can be changed", "open(f'/proc/{T[\"pid\"]}/comm', 'w').write('x')\nwon()"),
    Attack("has no pages that can be moved", "call(279, T['pid'], 1, struct.pack('Q', 0), None, ctypes.create_string_buffer(4), 0)\nwon()"),
]  # fmt: skip

if IS_ROOT:  # nobody else may advise other processes
    LOOK += [
        Attack("is given no advice", "p = os.pidfd_open(T['pid'])\ntry: call(440, p, struct.pack('QQ', 0, 0), 1, 20, 0)\nexcept OSError as e:\n  if e.errno in (errno.EPERM, errno.EACCES, errno.ESRCH, errno.ENOSYS): raise\nwon()"),
    ]  # fmt: skip

TOUCH = [
    Attack("is not killed", "os.kill(T['pid'], 9)\nwon()"),
    Attack("is not stopped", "os.kill(T['pid'], signal.SIGSTOP)\nwon()\nos.kill(T['pid'], signal.SIGCONT)"),
    Attack("cannot be asked for by signal 0", "os.kill(T['pid'], 0)\nwon()"),
    Attack("is not killed by its group", "os.killpg(T['pid'], 9)\nwon()"),
    Attack("is not killed by its thread", "call(200, T['pid'], 9)\nwon()"),
    Attack("is not killed by thread and group", "call(234, T['pid'], T['pid'], 9)\nwon()"),
    Attack("is not killed by a queued signal", "call(129, T['pid'], 10, struct.pack('iiiiii', 10, 0, -1, 0, 0, 0) + bytes(104))\nwon()"),
    Attack("is not opened by number", "os.pidfd_open(T['pid'])\nwon()"),
    Attack("is not signalled by input on a pipe", "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, T['pid'])\nfcntl.fcntl(r, fcntl.F_SETSIG, 9)\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nif fcntl.fcntl(r, fcntl.F_GETOWN) == T['pid']: os.write(w, b'x'); won()"),
    Attack("keeps its priority", "os.setpriority(os.PRIO_PROCESS, T['pid'], os.getpriority(os.PRIO_PROCESS, 0) + 1)\nwon()"),
    Attack("keeps the priority of its group", "os.setpriority(os.PRIO_PGRP, T['pid'], os.getpriority(os.PRIO_PROCESS, 0) + 1)\nwon()"),
    Attack("keeps its processors", "os.sched_setaffinity(T['pid'], {0})\nwon()"),
    Attack("keeps its scheduling", "os.sched_setscheduler(T['pid'], os.SCHED_BATCH, os.sched_param(0))\nwon()"),
    Attack("keeps its place at the disk", "call(251, 1, T['pid'], 3 << 13)\nwon()"),
    Attack("keeps its limits", "import resource\nresource.prlimit(T['pid'], resource.RLIMIT_NOFILE, (64, 64))\nwon()"),
    Attack("keeps its rank for lack of memory", "open(f'/proc/{T[\"pid\"]}/oom_score_adj', 'w').write('500')\nwon()"),
    Attack("keeps its core dump filter", "open(f'/proc/{T[\"pid\"]}/coredump_filter', 'w').write('0')\nwon()"),
]  # fmt: skip

MOST = ("untrusted", "moderate", "trusted", "bare", "filter-only")
PLACE = ("keeps its priority", "keeps the priority of its group", "keeps its processors")
FILTERS = ("untrusted", "moderate", "filter-only")


def every(attacks: list[Attack], walls: tuple[str, ...]) -> list[Attack]:
    return [attack._replace(walls=walls) for attack in attacks]


@cases(every(LOOK, MOST))
def test_a_process_outside(attack: Attack, wall: str, victim: subprocess.Popen[bytes]) -> None:
    fails(attack, wall, {"pid": victim.pid, "outside": True}, {"pid": victim.pid, "outside": False})
    assert alive(victim)


def state(pid: int) -> tuple[object, ...]:
    stopped = status(pid)["State"].startswith(("T", "t"))
    return stopped, os.getpriority(os.PRIO_PROCESS, pid), os.sched_getaffinity(pid), os.sched_getscheduler(pid)


@cases(every(TOUCH, MOST))
def test_a_process_that_is_not_ours(attack: Attack, wall: str, victim: subprocess.Popen[bytes]) -> None:
    other = canary_process()
    outside(attack, {"pid": other.pid})
    stop(other)
    before = state(victim.pid)
    held(inside(attack, wall, {"pid": victim.pid}))
    assert alive(victim) and before == state(victim.pid)


@cases(every(LOOK, MOST))
def test_init(attack: Attack, wall: str, victim: subprocess.Popen[bytes]) -> None:
    """Of the same user as the program, and yet it shows nothing."""
    fails(attack, wall, {"pid": victim.pid, "outside": True}, {"pid": 1, "outside": False})


@cases(every([one for one in TOUCH if one.promise in PLACE], FILTERS))
def test_init_keeps_its_place_at_the_processors(attack: Attack, wall: str, victim: subprocess.Popen[bytes]) -> None:
    """The end of a run is init's: behind all that the program keeps busy it would come late."""
    fails(attack, wall, {"pid": victim.pid}, {"pid": 1})


@cases(every(LOOK[:3] + LOOK[4:5] + TOUCH[2:3], ("untrusted", "trusted")))
def test_the_launcher_and_the_caller(attack: Attack, wall: str, victim: subprocess.Popen[bytes]) -> None:
    for pid in {launcher.current().pid, os.getpid(), os.getppid()} - {1}:  # 1 is the jail's own init, inside
        fails(attack, wall, {"pid": victim.pid, "outside": True}, {"pid": pid, "outside": False})


# Init's life.

DEADLY = {
    "signals": "for number in [n for n in range(1, 65) if n != 17]:\n  try: os.kill(T['pid'], number)\n  except OSError: pass",
    "queued signals": "for number in range(1, 65):\n  try: call(129, T['pid'], number, struct.pack('iiiiii', number, 0, -1, 0, 0, 0) + bytes(104))\n  except OSError: pass",
    "its thread": "for number in (9, 19, 11, 6):\n  try: call(234, T['pid'], T['pid'], number)\n  except OSError: pass",
    "its group": "for number in (9, 19, 15):\n  try: os.killpg(T['pid'], number)\n  except OSError: pass",
    "input on a pipe": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, T['pid']); fcntl.fcntl(r, fcntl.F_SETSIG, 9); fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')",
    "a flood": "for number in [17] * 3000 + [15] * 3000:\n  try: os.kill(T['pid'], number)\n  except OSError: pass",
}  # fmt: skip


@pytest.mark.parametrize("wall", with_starts(["untrusted", "moderate", "trusted", "bare"]))
@pytest.mark.parametrize("way", DEADLY)
def test_init_is_not_killed_by(way: str, wall: str, victim: subprocess.Popen[bytes]) -> None:
    """Were it, the run would end at once and its own exit status be lost."""
    deadly = Attack(way, DEADLY[way] + "\nwon()")
    if deadly.source not in SHOWN:
        outside(deadly, {"pid": victim.pid})
        assert victim.wait(5) < 0
    go_on = "\ntime.sleep(0.05)\nos.write(1, b'alive\\n')\nos._exit(7)"
    result = inside(Attack(way, DEADLY[way] + go_on), wall, {"pid": 1})
    assert b"alive" in result.stdout and (result.verdict, result.exit_code) == (Verdict.exit, 7), result.stdout


TRACE = "import ctypes, sys; pid = int(sys.argv[1])\nlibc = ctypes.CDLL(None)\nif libc.ptrace(0x4206, pid, 0, 0) == 0: print('WON')\ntry: open(f'/proc/{pid}/environ').read(); print('WON')\nexcept PermissionError: pass"


def test_init_and_launcher_cannot_be_traced_by_their_own_user() -> None:
    """Not dumpable, so neither their memory nor their environment is open to another process of the same user."""
    with Jail("untrusted").start_python("print('up', flush=True)\nimport time; time.sleep(30)", stdout=PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"up\n"
        init, resident = int(status(str(process.pid))["PPid"]), launcher.current().pid
        for pid in (init, resident):
            user = int(status(pid)["Uid"].split()[0])
            who = {"user": user or UNPRIVILEGED, "group": user or UNPRIVILEGED, "extra_groups": []} if IS_ROOT else {}
            victim = canary_process(**who)
            try:
                said = [
                    subprocess.run([PYTHON, "-c", TRACE, str(one)], capture_output=True, check=False, **who) for one in (victim.pid, pid)
                ]
            finally:
                stop(victim)
            assert b"WON" in said[0].stdout, said[0]
            assert b"WON" not in said[1].stdout and not said[1].stderr, said[1]
            assert not IS_ROOT or os.stat(f"/proc/{pid}/environ").st_uid == 0  # and not the user's


PYTHON = "/usr/bin/python3"
"""One that every user can execute."""
UNPRIVILEGED = 65534

KILL_ALL = "os.kill({target}, signal.SIGKILL)"


@pytest.mark.parametrize("wall", with_starts(EVERY_WALL))
@pytest.mark.parametrize("target", [0, -1])
def test_a_signal_to_all_stays_inside(target: int, wall: str, victim: subprocess.Popen[bytes]) -> None:
    """kill(0) and kill(-1): a session of its own and a PID namespace of its own."""
    code = f"import os, signal, subprocess, sys, time; c = subprocess.Popen(['sleep', '60'])\nif os.fork() == 0:\n  if {target}: os.setsid()\n  {KILL_ALL.format(target=target)}; os._exit(0)\nprint('killed', flush=True) if c.wait() else None"
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"] if target == -1 else []
    if target == -1:
        done = subprocess.run([*alone, sys.executable, "-c", code], capture_output=True, timeout=20 * PATIENCE, check=False)
        assert b"killed" in done.stdout, done
    else:
        group = subprocess.Popen(["sleep", "60"], process_group=0)
        subprocess.run(
            [sys.executable, "-c", KILL_ALL.format(target=0).join(("import os, signal; ", ""))], process_group=group.pid, check=False
        )
        assert group.wait(5) == -signal.SIGKILL
    result = inside(Attack("", f"signal.signal(15, signal.SIG_IGN)\nos.kill({target}, 15)\nos.write(1, b'done\\n')"), wall)
    assert b"done" in result.stdout or b"HELD" in result.stdout
    inside(Attack("", KILL_ALL.format(target=target)), wall)
    assert alive(victim)


def test_the_program_is_not_process_one_and_leads_its_own_session(level: str) -> None:
    result = nsjail_py.run_python(
        "import os; print(os.getpid() != 1, os.getppid() == 1, os.getsid(0) == os.getpid() == os.getpgrp())", policy=level
    )
    assert result.check().stdout == b"True True True\n"


def test_only_its_own_processes_are_listed(level: str, victim: subprocess.Popen[bytes]) -> None:
    outside(Attack("", "if len([p for p in os.listdir('/proc') if p.isdigit()]) > 2: won()"))
    result = nsjail_py.run_python(
        "import os; print([p for p in os.listdir('/proc') if p.isdigit() and p != str(os.getpid())])", policy=level
    )
    assert result.check().stdout in (b"[]\n", b"['1']\n")


def test_a_program_that_clears_its_death_signal_still_dies_with_the_launcher() -> None:
    """The end of a jail never depends on the program's good will."""
    marker = f"orphan-{os.getpid()}"
    escape = "import ctypes, os, sys, time\nctypes.CDLL(None).prctl(1, 0)\nchild = os.fork()\nif child: os.waitpid(child, 0)\nelse:\n  os.setsid()\n  if os.fork(): os._exit(0)\n  ctypes.CDLL(None).prctl(1, 0)\nprint('up', flush=True)\ntime.sleep(60)"
    caller = f"import nsjail_py, sys\np = nsjail_py.Jail('moderate').start_python({escape!r}, args=['{marker}'], stdout=1)\nprint(nsjail_py.launcher.current().pid, flush=True)\np.wait()"
    from .runner import processes_with

    for who in ("caller", "launcher"):
        done = subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert done.stdout
        lines = [done.stdout.readline().strip() for _ in range(3)]
        pid = next(int(line) for line in lines if line != "up")
        inside_now = [p for p in processes_with(marker) if p != done.pid]
        assert len(inside_now) == 2, inside_now
        os.kill(done.pid if who == "caller" else pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while [p for p in processes_with(marker) if p != done.pid] and time.monotonic() < deadline:
            time.sleep(0.01)
        left = [p for p in processes_with(marker) if p != done.pid]
        done.kill()
        done.wait()
        done.stdout.close()
        assert not left, who
