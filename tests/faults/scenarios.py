"""Runs that between them make every call that the launcher makes, and what each must look like when one of the calls fails."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from conftest import PATIENCE

import nsjail_py
from nsjail_py import Jail, JailError, LauncherDied, SetupError, launcher, reports

from .shim import ROLES, Point, Shim

IS_ROOT = os.geteuid() == 0
LOOK = "for fd in /proc/self/fd/*; do echo $fd; done\n" + "".join(
    f'while read -r line; do echo "{name} $line"; done < /proc/self/{name}\n' for name in ("status", "limits", "mountinfo")
)
"""A program that says how it is confined: whatever failed, it never runs with less."""
CONFINED = "print('ran'); print(*(line for line in open('/proc/self/status') if line[:3] in ('Cap', 'Uid', 'NoN', 'Sec')))\n"
"""The same in Python, in short."""
TOLD = ("Uid", "Gid", "Groups", "Sig", "Shd", "Cap", "NoNewPrivs", "Seccomp")
BUSY = """
import os, signal, socket, time
terminated = []
signal.signal(15, lambda *a: (os.write(1, b"term\\n"), terminated.append(1)))
try: socket.socket()
except PermissionError: print("denied", flush=True)
while not terminated: time.sleep(0.005)
while True: pass
"""


class Outcome(NamedTuple):
    """One run: how it ended, what it wrote, which protections it is said to have had."""

    end: object
    output: tuple[str, ...]
    protections: object = None


class Take(NamedTuple):
    """A scenario with one call failing."""

    point: Point | None
    error: int
    outcomes: list[Outcome]
    log: list[Point]
    hit: int
    left: tuple[int, ...]


def confinement(text: str) -> tuple[str, ...]:
    """What the program saw, without what differs from run to run."""
    lines = []
    for line in text.splitlines():
        words = line.split() or [""]
        if words[0] == "mountinfo":
            lines.append(" ".join(words[4:]))
        elif words[0] != "status" or words[1].startswith(TOLD):
            lines.append(" ".join(words))
    return tuple(lines)


def outcome(jail: Jail, args: list[str] | None, source: str = "", poke: bool = False) -> Outcome:
    """One run with a pipe of ours as its standard output: we see what was written also when there is no result."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    end: object
    protections = None
    try:
        process = jail.start(args, stdout=write) if args else jail.start_python(source, stdout=write)
        os.close(write)
        write = -1
        if poke:
            _poke(process, read)
        with process:
            result = process.wait(timeout=15 * PATIENCE)  # only what never ends takes it
        end, protections = (str(result.verdict), result.exit_code, result.signal, tuple(result.denied.items())), result.protections
    except (JailError, OSError, subprocess.TimeoutExpired) as error:
        end = error
    finally:
        if write >= 0:
            os.close(write)
    try:
        text = os.read(read, 1 << 16).decode()
    except BlockingIOError:
        text = ""
    os.close(read)
    return Outcome(end, confinement(text), protections)


def _poke(process: nsjail_py.Process, read: int) -> None:
    """Asks for the program's number, and sends it a signal when it is ready for one."""
    deadline = time.monotonic() + 3  # as slow as the machine may be: the processor clock ends it before
    pid = process.pid
    assert pid is None or pid > 0
    before = b""
    while time.monotonic() < deadline and not process.reported:
        try:
            before += os.read(read, 100)
        except BlockingIOError:
            time.sleep(0.002)
        if b"denied" in before:
            break
    process.send_signal(signal.SIGTERM)


def shared() -> list[Outcome]:
    """The first cell makes the shared root, the second takes it, the third comes from stock."""
    jail = Jail("untrusted", stock=1)
    outcomes = []
    for turn in range(3):
        outcomes.append(outcome(jail, ["/bin/sh", "-c", LOOK]))
        deadline = time.monotonic() + (0.1 if turn == 1 else 0)
        while time.monotonic() < deadline and not _stocked():
            time.sleep(0.001)
    return outcomes


def _stocked() -> bool:
    try:
        return bool(cells())
    except OSError:
        return False


def cells() -> list[str]:
    current = launcher._current
    return Path(f"/proc/{current.pid}/task/{current.pid}/children").read_text().split() if current else []


def own() -> list[Outcome]:
    """A directory of the host's, mapped to the jail's user, and a script."""
    with _directory() as path:
        jail = Jail("untrusted", stock=0, workdir=path)
        outcomes = [outcome(jail, None, CONFINED + "open('canary', 'x').close()"), outcome(jail, None, CONFINED)]
        first = outcomes[0]
        assert os.path.exists(f"{path}/canary") == bool(first.output), first
    return outcomes


@contextmanager
def _directory() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="faults-")
    try:
        if IS_ROOT:
            os.chown(path, 12345, 12345)
        yield path
    finally:
        shutil.rmtree(path)


def ended() -> list[Outcome]:
    """A denied call, a signal, the question for the program's number, and the end by the processor clock."""
    jail = Jail("untrusted", stock=0, cpu_time=0.1 * PATIENCE, wall_time=3 * PATIENCE)
    return [outcome(jail, None, BUSY, poke=True), outcome(jail, ["/bin/sh", "-c", "echo next"])]


def warm() -> list[Outcome]:
    """A template, the two jobs that it is tried with, and two for the caller."""
    with Jail("untrusted", preload=[], stock=0, hostname="warm") as jail:
        return [outcome(jail, None, CONFINED) for _ in range(2)]


def large() -> list[Outcome]:
    """A job of a template that has enough in its memory for it to be mapped from a file."""
    with Jail("untrusted", preload=["asyncio", "unittest", "xml.dom.minidom", "email.mime.text"], stock=0, hostname="large") as jail:
        return [outcome(jail, None, CONFINED)]


SCENARIOS: dict[str, Callable[[], list[Outcome]]] = {"shared": shared, "own": own, "ended": ended, "warm": warm}


def take(shim: Shim, scenario: Callable[[], list[Outcome]], point: Point | None, error: int, most: tuple[int, ...] = (0, 0, 0)) -> Take:
    """A new launcher, one failing call, the scenario, two runs more, of which the first may still take what the fault has spoiled; then what
    is left, for which it is waited until it is `most`."""
    launcher.shutdown()
    shim.arm(point, error)
    outcomes = scenario()
    hit, log = shim.hit, shim.log()
    shim.arm(None)
    outcomes += [outcome(Jail("untrusted", stock=0), ["/bin/sh", "-c", "echo last"]) for _ in range(2)]
    deadline = time.monotonic() + 5.0 * PATIENCE
    while more(rest := left(), most) and time.monotonic() < deadline:
        time.sleep(0.002)
    return Take(point, error, outcomes, log, hit, rest)


def more(left: tuple[int, ...], most: tuple[int, ...]) -> bool:
    return any(a > b for a, b in zip(left, most, strict=True))


def left() -> tuple[int, ...]:
    """Cells, descriptors of the launcher, control groups. What is in stock is ended first."""
    current = launcher.current()
    waiting = cells()
    for init in waiting:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(init), signal.SIGKILL)
    return (
        len(waiting),
        _descriptors(current.pid) if IS_ROOT else 0,
        sum(len(list(os.walk(top))) for top in current.claim.directories.values()),
    )


def _descriptors(pid: int) -> int:
    """Without the shared parts of roots, which stay for ten seconds."""
    count = 0
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += not os.readlink(f"/proc/{pid}/fd/{number}").startswith("mnt:")
    return count


EXEC = "execveat"
ALWAYS = {
    "close": "the kernel lets go of a descriptor all the same",
    "closedir": "as close",
    "munmap": "as close",
    "prctl:15": "the launcher's name in ps",
    "getrlimit": "fewer runs at a time, and then they are refused",
    "setrlimit:7": "as getrlimit",
    "sched_getaffinity": "the processor clock looks less often; the total is compared at the end",
    "setsockopt": "a template can be told of fewer jobs at one time; one that it cannot be told of is an error",
    "epoll_ctl:2": "closing takes it out as well, and what is still heard of it has an old generation",
    "unlinkat": "a control group that cannot be removed is swept later",
    "fdopendir": "as unlinkat",
    "readdir": "as unlinkat",
    "waitid": "a dead init stays in the table until the launcher ends",
    "pidfd_send_signal": "init ends with its socket as well",
    "ioctl:-1068490496": "a denied call that cannot be received is asked for again",
}
"""Calls whose failure changes nothing that matters, and why."""
AFTER_EXEC = {
    "open": "figures of use",
    "openat": "figures of use",
    "pread": "figures of use, of which those that limits rest on are looked at again",
    "read": "figures of use; a timer that cannot be read is asked again",
    "opendir": "where there are no descriptors or no memory, it is looked again at once",
    "realloc": "as opendir",
    "clock_gettime": "figures of use",
    "clock_gettime:3": "how long a look at memory took: the pause after it is too short, or a second",
    "fstatfs": "whether the disk was full",
    "getrusage": "figures of use",
    "getsockopt": "a job that was killed before it took its order is taken for one that has begun",
    "kill": "what is left is killed with init",
    "waitpid": "as kill",
    "epoll_wait": "a launcher that ends between two runs is replaced without a word",
    "recvmsg": "asked again: what is not received stays where it is",
}
"""The same, once the program runs."""
SNAPSHOT = {
    "open": "a template whose memory cannot be mapped from a file has it as it was",
    "read": "as open",
    "mmap": "as open",
    "memfd_create": "as open",
    "pread": "as open",
    "pwrite": "as open",
}
"""The same, of a template that is quick and no less jailed."""
AT_ITS_END = {
    "fflush": "of what it could not write at a program's end exit(3) tells nobody either",
    "sigfillset": "a signal may interrupt what comes next",
    "sigprocmask": "as sigfillset",
    "exit_group": "the job ends without asking, and is waited for",
}
"""The same, of a job that has run; a template only flushes."""
INIT = {"read": "init looks again at the next signal", "personality": "the default one is taken where it cannot be asked for"}
RESULT = {
    EXEC: "exec_failed",  # a result by design: the file may not be a program
    "recv": "killed",  # a caller who cannot be heard is gone
}
"""Calls whose failure is a verdict."""
POKED = {
    "open": "the program's number is not known",
    "read": "the program's number is not known",
    "ioctl:-1072160511": "the denied call never returns",
    "kill": "a signal is lost",
    "sendmsg": "a signal is lost",
}
"""What the scenario `ended` asks for beside the run, and does not get."""
TOLD_NESTED = ("open", "openat", "write")
"""nested_userns is under best_effort: the result says that it is missing."""


NO_ANSWER = "sendmsg"
"""The launcher's answer itself: what becomes of that it cannot say, and the caller names the step `request`."""
OTHER_ERRNO = {"fcntl:1034": errno.EINVAL, "read": errno.ESRCH, "setfsuid": errno.EPERM}
"""What cannot be asked about its seals has none; a child that is not found is none; the id for files has no errors, it is looked at."""


def judge(taken: Take, base: Take, scenario: str) -> str:
    """What became of the failing call, as one word and what is to be said about it; `WRONG` first when that is against the rules."""
    point = taken.point
    assert point
    if not taken.hit:
        return "not-made"
    if taken.outcomes[-1] != base.outcomes[-1] and not _only_nested(taken.outcomes[-1], base.outcomes[-1]):
        return f"WRONG: the next run does not work: {taken.outcomes[-1].end!r}"
    if IS_ROOT and point.call not in ("waitid", "unlinkat") and more(taken.left, base.left):
        return f"WRONG: left behind (cells, descriptors, groups): {taken.left}, without the fault {base.left}"
    if point.role in ROLES[3:]:
        return _judge_job(taken, base)
    failed = [number for number, (got, wanted) in enumerate(zip(taken.outcomes, base.outcomes, strict=True)) if got != wanted]
    cell = failed[0] + 1 if point.role == "launcher" and failed else point.cell
    executed = [call.cell for call in taken.log[: taken.hit - 1] if call.name == EXEC]
    # Runs come one after the other, each in whichever cell was ready: so many have executed their program.
    ran = cell in executed or (point.role == "launcher" and bool(failed) and len(executed) > failed[0])
    stock = scenario == "shared" and point.cell >= (2 if point.role == "launcher" else 3)
    wrong = [(got, wanted) for got, wanted in zip(taken.outcomes, base.outcomes, strict=True) if got != wanted]
    if point.name in TOLD_NESTED and wrong and all(_only_nested(got, wanted) for got, wanted in wrong):
        return "told"
    if not wrong:
        allowed = stock or _by_design(taken) or (ran and point.name in AFTER_EXEC) or (point.role == "init" and point.name in INIT)
        # A launcher that is gone before it has taken anything is replaced without a word.
        allowed |= (point.role, point.cell) == ("launcher", 0)
        # In "own" there is a child that brings an id map, too: what reads is not the program, and nobody misses its end.
        allowed |= (scenario, point.role, point.name) in (("own", "program", "read"), ("own", "init", "waitpid"))
        return "harmless" if allowed else "WRONG: nothing came of it"
    if len(wrong) > 1:
        return f"WRONG: more than one run failed: {[got.end for got, _ in wrong]!r}"
    got, wanted = wrong[0]
    if not isinstance(got.end, JailError):
        verdict = got.end[0] if isinstance(got.end, tuple) else ""
        if RESULT.get(point.name) == verdict and not got.output:
            return "verdict"
        if scenario == "ended" and ran and point.name in POKED:
            return "poked"
        return f"WRONG: {got.end!r}, {got.output!r:.80}"
    # What fails in the launcher behind the order ends a program that may have begun by then: with all its walls.
    ran |= point.role == "launcher" and got.output[:-1] == wanted.output[: len(got.output) - 1]
    if got.output and not ran:
        return f"WRONG: {got.end!r}, and the program ran"
    if isinstance(got.end, LauncherDied):
        return "died" if point.role == "launcher" else f"WRONG: {got.end!r}"
    assert isinstance(got.end, SetupError)
    if got.end.step not in reports.STEP_NAMES.values() and got.end.step != "launcher":
        return f"WRONG: an unknown step: {got.end!r}"
    if (point.role, point.name, got.end.step) == ("launcher", NO_ANSWER, "request"):
        return "typed"
    if got.end.errno not in (taken.error, OTHER_ERRNO.get(point.name)) and got.end.step != "lost":
        return f"WRONG: another errno: {got.end!r}"
    return "lost" if got.end.step == "lost" else "typed"


def _by_design(taken: Take) -> bool:
    """Whether it may come to nothing."""
    assert taken.point
    return taken.point.name in ALWAYS or (taken.point.name, taken.error) in {
        ("keyctl", errno.ENOSYS),  # a kernel may lack keyrings altogether
        ("ioprio_get", errno.ENOSYS),  # one without block devices has no order among them
        ("openat2", errno.ENOSYS),  # filters withhold it so, and then beneath.c goes step by step
        ("prlimit64", errno.EPERM),  # a hard limit that is in the way is one that stands already; the second call sees to that
    }


def _judge_job(taken: Take, base: Take) -> str:
    """Of a call that a template or a job makes: no job runs that lacks anything, and only a template's own end costs another job."""
    point = taken.point
    assert point
    different = [(got, wanted) for got, wanted in zip(taken.outcomes, base.outcomes, strict=True) if got != wanted]
    wrong = [got for got, _ in different]
    # Its end may overtake that of its last job, which has begun, with all its walls. When it has made the four that there are, no order comes.
    its_end = (point.role, point.name) == ("template", "recvmsg")
    last_order = its_end and point.cell == 4
    if not wrong:
        allowed = last_order or _by_design(taken) or (point.role == "template" and point.name in SNAPSHOT)
        allowed |= point.name in AT_ITS_END
        return "harmless" if allowed else "WRONG: nothing came of it"
    if its_end and any(isinstance(got.end, SetupError) and got.output == wanted.output != () for got, wanted in different):
        return "lost" if len(wrong) == 1 else f"WRONG: more than one run failed: {[got.end for got in wrong]!r}"
    if any(not isinstance(got.end, SetupError) or got.output for got in wrong):
        return f"WRONG: {[(got.end, got.output) for got in wrong]!r:.200}"
    ends = [got.end for got in wrong if isinstance(got.end, SetupError)]
    if point.role == "template" and all(end.step in ("template", "lost", "clone") for end in ends):
        return "typed"
    if len(ends) > 1:
        return f"WRONG: more than one run failed: {ends!r}"
    return "typed" if ends[0].errno == taken.error else f"WRONG: another errno: {ends[0]!r}"


def _only_nested(got: Outcome, wanted: Outcome) -> bool:
    if not isinstance(got.protections, tuple) or not isinstance(wanted.protections, tuple) or got[:2] != wanted[:2]:
        return False
    return {a.name for a, b in zip(got.protections, wanted.protections, strict=True) if a != b} == {"nested_userns"}
