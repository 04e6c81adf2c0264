"""An attack, the walls that it is tried behind, and its two sides: `outside`, where it must win, and `held`, where it must not.

The source of an attack is Python. Before it stands PRELUDE, which gives it `T` (what to attack), `call` (a raw system call) and `won`.
What it may do is bounded, and it touches only what T names, since outside it succeeds.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
from conftest import IS_ROOT, PATIENCE
from msgspec.structs import replace
from test_stock import cells, parked, until

import nsjail_py
from nsjail_py import Jail, Policy, Result, Verdict
from nsjail_py.cli import LIMIT as ENDED_BY_LIMIT
from nsjail_py.cli import SETUP
from nsjail_py.launcher import PROGRAM
from nsjail_py.policyfile import override
from nsjail_py.saved import save

Target = Mapping[str, Any]

PRELUDE = """
import ctypes, errno, json, mmap, os, signal, socket, stat, struct, sys, threading, time
T = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(nr, *args):
    sent = [a if isinstance(a, (bytes, ctypes.Array, ctypes.Structure)) or a is None else ctypes.c_long(a) for a in args]
    result = libc.syscall(ctypes.c_long(nr), *sent)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def won(what=''):
    os.write(1, f'WON {what}\\n'.encode())
def body(source=sys.argv[2]):
    try:
        exec(compile(source, 'attack', 'exec'), globals())
    except (OSError, MemoryError, RuntimeError) as error:
        os.write(1, f'HELD {type(error).__name__} {error}\\n'.encode())
    else:
        os.write(1, b'DONE\\n')
body()
"""


class Attack(NamedTuple):
    """One attempt. It says `won()` when it has reached what the promise keeps from it."""

    promise: str
    source: str
    walls: tuple[str, ...] = ("untrusted", "moderate", "bare")
    rights: bool = False
    """Whether it takes an administrator's rights, which outside are given in namespaces of its own."""


def _walls() -> dict[str, Policy]:
    untrusted, moderate, trusted = (nsjail_py.policy(name) for name in ("untrusted", "moderate", "trusted"))
    return {
        "untrusted": untrusted,
        "moderate": moderate,
        "trusted": trusted,
        # One layer taken out, the others must hold:
        "no-filter": replace(untrusted, syscalls=None),
        "no-landlock": replace(untrusted, landlock=False),
        # Namespaces, root and identity, and nothing else:
        "bare": replace(untrusted, syscalls=None, landlock=False),
        # One layer on the host's own files and network:
        "filter-only": replace(trusted, syscalls=untrusted.syscalls),
        "landlock-only": replace(trusted, landlock=True),
    }


WALLS = _walls()
EVERY_WALL = tuple(WALLS)
LEVELS = ("untrusted", "moderate", "trusted")
FILTERED = ("untrusted", "moderate", "no-landlock", "filter-only")
UNFILTERED = ("no-filter", "bare", "trusted")
SHOWN: set[str] = set()
"""Sources that have won outside."""
LIMIT = 20.0 * PATIENCE
"""Seconds for one side of one attack."""


STARTS = {"untrusted": ("stock", "warm"), "moderate": ("stock", "warm")}
"""How else than by an exec in a new cell a program starts: in a cell from stock, or forked from a warm interpreter."""
SAMPLED = "moderate/stock"
"""Where only the first attack of a table is tried: a tenth of a second each, for one more policy in cells that are all alike."""
ALONE = ("untrusted",)
"""Walls behind which attacks are also started by the launcher alone, which says less of how they ended."""


def with_starts(walls: Iterable[str]) -> list[str]:
    """Each wall, and behind the levels also the other ways to start: `untrusted/warm`."""
    return [name for wall in walls for name in (wall, *(f"{wall}/{start}" for start in STARTS.get(wall, ())))]


def cases(attacks: Iterable[Attack], lack: Callable[[Attack, str], str] = lambda attack, wall: "") -> Any:
    """Each attack with each of its walls, started in each way; the id reads as the promise. lack: why a wall cannot hold on this kernel."""

    def marks(attack: Attack, wall: str) -> pytest.MarkDecorator:
        why = lack(attack, wall)
        return pytest.mark.elsewhere(bool(why), why=why)

    rows = [
        pytest.param(attack, wall, id=f"{attack.promise.replace(' ', '_')}-{wall}", marks=marks(attack, wall))
        for number, attack in enumerate(attacks)
        for wall in (*with_starts(attack.walls), *(f"{wall}/alone" for wall in attack.walls if wall in ALONE))
        if wall != SAMPLED or not number
    ]
    return pytest.mark.parametrize(("attack", "wall"), rows)


def _bounded() -> None:
    """What an attack outside may take of this machine at most."""
    resource.setrlimit(resource.RLIMIT_CPU, (15, 15))
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, 256 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def own_namespaces() -> list[str]:
    """A command that gives an administrator's rights where nothing of this machine can be changed with them."""
    user = [] if IS_ROOT else ["--user", "--map-root-user"]
    return ["unshare", *user, "--mount", "--propagation", "private", "--uts", "--ipc", "--net", "--"]


def _outside(attack: Attack, target: str, options: dict[str, Any]) -> str:
    prefix = own_namespaces() if attack.rights else []
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PRELUDE, target, attack.source],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        preexec_fn=_bounded,
        start_new_session=True,
        **options,
    )
    return done.stdout + done.stderr


def outside(attack: Attack, target: Target | None = None, **options: Any) -> None:
    """Shows that the attack works where there is no jail. Once in a session."""
    if attack.source not in SHOWN:
        said = _outside(attack, json.dumps(target or {}), options)
        assert "WON" in said, f"the attack is broken: outside it comes to\n{said}"
        SHOWN.add(attack.source)


def inside(attack: Attack, wall: str | Policy, target: Target | None = None, **options: Any) -> Result:
    """The same attack in a jail."""
    return run_python(PRELUDE, wall, args=[json.dumps(target or {}), attack.source], **{"timeout": LIMIT, "wall_time": LIMIT} | options)


def run_python(source: str, wall: str | Policy, **options: Any) -> Result:
    """Like nsjail_py.run_python, started as the wall says."""
    name, _, start = wall.partition("/") if isinstance(wall, str) else ("", "", "")
    policy = WALLS[name] if isinstance(wall, str) else wall
    if not start:
        return nsjail_py.run_python(source, policy=policy, **options)
    streams = {name: options.pop(name) for name in ("args", "timeout", "stdin", "stdout", "stderr", "pass_fds") if name in options}
    policy = override(policy, **options)
    if start == "alone":
        return _alone(policy, source, **streams)
    return warm(policy).run_python(source, **streams) if start == "warm" else _from_stock(policy, source, streams)


def _alone(policy: Policy, source: str, args: Iterable[str] = (), timeout: float = LIMIT) -> Result:
    """What an attack came to under a saved plan, in the words of a result: as far as the launcher alone says it."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    with tempfile.TemporaryDirectory() as top:
        save(policy, f"{top}/plan", python)
        command = [PROGRAM, f"{top}/plan", "--", python, "-s", "-c", source, *args]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
    assert done.returncode != SETUP, done.stderr
    reason = done.stderr.decode(errors="replace").rpartition("nsjail-launcher: ")[2].partition(":")[0]
    verdict = Verdict(reason) if done.returncode == ENDED_BY_LIMIT else Verdict.exit if done.returncode else Verdict.ok
    known: dict[str, Any] = {"verdict": verdict, "stdout": done.stdout, "stderr": done.stderr, "exit_code": done.returncode}
    blank: dict[str, Any] = dict.fromkeys(Result.__struct_fields__) | {"evidence": {"exit_code": done.returncode}, "denied": {}}
    return Result(**(blank | known))


@functools.lru_cache(maxsize=1)
def warm(policy: Policy) -> Jail:
    """A jail with a warm interpreter; the one before ends."""
    close_warm()
    WARM.append(Jail(policy, preload=[]))
    return WARM[0]


WARM: list[Jail] = []


def close_warm() -> None:
    while WARM:
        WARM.pop().close()
    warm.cache_clear()


def _from_stock(policy: Policy, source: str, streams: dict[str, Any]) -> Result:
    """The run before puts one cell in stock, which is seen to be taken, and this one none."""
    before = set(cells())
    for _ in range(2):
        Jail(policy, stock=1).run_python("pass").check()
    waiting: set[int] = set()

    def one_waits() -> bool:
        nonlocal waiting
        waiting = {init for init in set(cells()) - before if parked(init)}
        return len(waiting) == 1 and len(set(cells()) - before) == 1

    assert until(one_waits), "no cell in stock"
    result = Jail(policy, stock=0).run_python(source, **streams)
    assert until(lambda: not waiting & set(cells())), "the cell from stock was not taken"
    return result


ENDED = {Verdict.syscall, Verdict.cpu_time, Verdict.wall_time, Verdict.memory, Verdict.processes, Verdict.output, Verdict.disk}


def held(result: Result) -> Result:
    """The attack was tried and came to nothing: refused, without effect, or ended by a limit. Not: broken."""
    said = (result.stdout + result.stderr).decode(errors="replace")
    assert "WON" not in said, said
    finished = b"HELD" in result.stdout or b"DONE" in result.stdout
    assert finished or result.verdict in ENDED, f"the attack itself failed: {result.summary}\n{said}"
    return result


def fails(
    attack: Attack, wall: str | Policy, target: Target | None = None, at: Target | None = None, *, wins: bool = True, **options: Any
) -> Result:
    """Outside the attack wins, behind the wall it does not. `at`: what it goes for inside, when that is not the same. `wins`: False on a
    host that has nothing to be won."""
    if wins:
        outside(attack, target)
    return held(inside(attack, wall, at if at is not None else target, **options))


def alive(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def stop(process: subprocess.Popen[Any]) -> None:
    """Ends a canary process of the test's own."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()


def canary_process(**options: Any) -> subprocess.Popen[bytes]:
    """A process that does nothing, to be attacked."""
    return subprocess.Popen(
        ["sleep", "300"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"CANARY": "s3cret-canary"},
        start_new_session=True,
        **options,
    )


def status(pid: int | str) -> dict[str, str]:
    """/proc/PID/status as a table."""
    with open(f"/proc/{pid}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def processes_with(marker: str) -> list[int]:
    """Processes on this machine whose command line has the marker."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    text = file.read()
            except OSError:
                continue
            if marker.encode() in text and int(name) != os.getpid():
                found.append(int(name))
    return found
