"""`nsjail-py selftest`: attacks a jail of the user's own policy on his own machine, and tells which promise held and what held it.

One run makes most attacks (selftest_probe.py), on objects of the host that are worth nothing (selftest_canaries.py); each limit that ends a
run has a short one of its own, with small numbers. A promise that the policy does not make is attacked all the same: what is shown as
"not promised" tells whether the attack succeeded.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from . import hostinfo, launcher, syscalls
from .jail import PIPE, Jail
from .oneline import one_line
from .policy import Policy
from .policyfile import override, resolve
from .result import Result, Verdict
from .selftest_canaries import VARIABLE, Canaries
from .selftest_promises import FAMILIES, Promise, permits, promises
from .unpack import decode_json

State = Literal["held", "FAILED", "not promised", "unavailable"]
MIB = 1 << 20
BOUNDS = {"open_files": 96, "file_size": 4 * MIB, "disk": 8 * MIB, "files": 1000, "processes": 24}
"""The numbers with which the limits are tried: the policy's own where they are smaller. Without a limit the attack ends a little above."""
ROOM = {"memory": 256 * MIB, "cpu_time": 20.0, "wall_time": 20.0, "idle_time": 20.0, "output": MIB}
"""What the attacks themselves need: the limits that are not tried in the same run are at least so."""
SECONDS_TO_CLEAR = 3.0


class Outcome(NamedTuple):
    """What an attack came to."""

    got: bool
    how: str
    """What it got, or the error that it met."""
    lack: str = ""
    """Why it proves nothing here."""


class Check(NamedTuple):
    """One promise and what became of it."""

    name: str
    area: str
    promise: str
    state: State
    layer: str
    """What held it: the first wall in its way. Where none is promised: empty."""
    behind: tuple[str, ...]
    """Further walls of the policy, which were not reached."""
    detail: str


class Report(NamedTuple):
    policy: str
    mode: str
    checks: list[Check]
    seconds: float

    @property
    def ok(self) -> bool:
        return not any(check.state == "FAILED" for check in self.checks)


def report(policy: Policy | str | os.PathLike[str] = "untrusted") -> Report:
    """Attacks a jail of this policy. Raises JailError where none can be made."""
    started = time.monotonic()
    wanted = resolve(policy)
    with Canaries() as canaries:
        table = promises(canaries.target["file"], VARIABLE)
        before = traces()
        outcomes, result = _attack(wanted, canaries, table)
        for name, trial in TRIALS.items():
            outcomes[name] = trial(wanted)
        outcomes |= _left(wanted, canaries, before)
        outcomes |= {name: Outcome(False, "", lack) for name, lack in canaries.lacks.items()}
    missing = {p.name: p.reason for p in result.protections if p.state == "unavailable"}
    checks = [_judge(promise, wanted, outcomes.get(promise.attack), result, missing) for promise in table]
    return Report(wanted.name, result.mode, checks, time.monotonic() - started)


# ---------------------------------------------------------------- judging


def _judge(promise: Promise, policy: Policy, outcome: Outcome | None, result: Result, missing: dict[str, str]) -> Check:
    asked = [layer for layer in promise.layers if layer.asked(policy)]
    there = [layer for layer in asked if layer.protection not in missing]
    names = [layer.name for layer in there]

    def check(state: State, detail: str) -> Check:
        first = names[0] if state == "held" else ""
        return Check(promise.attack, promise.area, promise.text, state, first, tuple(names[1:]) if first else (), detail)

    if outcome is None:
        return check("FAILED", f"the attack gave no answer: {result.summary}")
    if not asked:
        ended = "the attack succeeds" if outcome.got else "the attack fails all the same"
        return check("not promised", outcome.lack or ": ".join(filter(None, (ended, outcome.how))))
    if outcome.lack:
        return check("unavailable", outcome.lack)
    if not there:
        return check("unavailable", "; ".join(dict.fromkeys(missing[layer.protection] for layer in asked)))
    return check("FAILED" if outcome.got else "held", outcome.how)


# ---------------------------------------------------------------- the run that makes the attacks


def _attack(policy: Policy, canaries: Canaries, table: list[Promise]) -> tuple[dict[str, Outcome], Result]:
    """All that can be tried in one run, and the result of that run."""
    alone = {*TRIALS, "left-processes", "left-files", "left-memory", "left-on-host", "dead-caller", "own-uid"}
    attacks = [promise.attack for promise in table if promise.attack not in alone]
    attacks.insert(attacks.index("new-uts-namespace"), "leave-something")
    before = canaries.process_changed()
    outcomes, result, uid = _probe(policy, canaries, attacks)
    if canaries.datagram_came():
        outcomes["udp-to-host"] = Outcome(True, "it came")
    elif outcomes.get("udp-to-host", Outcome(False, "")).got:
        outcomes["udp-to-host"] = Outcome(False, "it never came")
    if (changed := canaries.process_changed()) and not before:
        outcomes["signal-outside"] = outcomes["priority-outside"] = Outcome(True, changed)
    if "unknown-call" in outcomes:
        told = "syscall 1023" in result.denied
        outcomes["unknown-call"] = Outcome(not told, "ENOSYS, counted" if told else "the kernel was asked")
    outcomes["own-uid"] = Outcome(uid in (0, os.geteuid()), f"uid {uid} on the host", "" if uid >= 0 else "the host's /proc hides it")
    return outcomes, result


def _probe(policy: Policy, canaries: Canaries, attacks: list[str]) -> tuple[dict[str, Outcome], Result, int]:
    source = Path(__file__).with_name("selftest_probe.py").read_bytes()
    target = {**canaries.target, **_target(policy, attacks)}
    with Jail(_with_room(policy), stock=0).start_python(source, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        uid = _owner(process.pid)
        result = process.communicate(jsonlib.dumps(target).encode() + b"\n")
    try:
        answers = decode_json(result.stdout, dict[str, tuple[bool, str]])
    except ValueError:
        answers = {}
    return {name: Outcome(got, one_line(how[:200])) for name, (got, how) in answers.items()}, result, uid


def _target(policy: Policy, attacks: list[str]) -> dict[str, Any]:
    """What the probe has to know about this policy and this machine."""
    refused = {}
    for name, (_, calls) in FAMILIES.items():
        known = [call for call in calls if syscalls._number(call) >= 0]
        # Where the filter refuses none of a family, all are tried: nothing is promised then.
        refused[name] = [call for call in known if policy.syscalls and not permits(policy, call, -1)] or known
    named = {call for _, calls in FAMILIES.values() for call in calls} | set(CALLS)
    numbers = {call: number for call in sorted(named) if (number := syscalls._number(call)) >= 0}
    limits = _with_room(policy).limits
    bounds = {name: bound if (own := getattr(limits, name)) is None else own for name, bound in BOUNDS.items()}
    writable = [mount.target for mount in policy.mounts if mount.writable]
    return {
        "attacks": attacks,
        "families": refused,
        "filtered": policy.syscalls is not None,
        "core_helper": hostinfo.core_helper(),
        "numbers": numbers,
        "writable": writable,
        "scratch": "/tmp/selftest",
        "leave": ["/tmp", "/dev/shm", "/work"],
        **bounds,
    }


CALLS = (
    *("name_to_handle_at", "open_by_handle_at", "mount", "umount2", "fsopen", "open_tree", "pivot_root", "chroot", "setns", "pidfd_open"),
    *("ptrace", "shmget", "semget", "msgget", "mq_open", "keyctl", "capget", "ioctl", "clone3", "openat2", "execve", "unshare", "clone"),
)
"""What the probe calls by number, beside the families."""


def _with_room(policy: Policy) -> Policy:
    """The policy with small numbers for the limits that are tried, room for the attacks, and a filter that lets the run go on."""
    limits: dict[str, Any] = {}
    for name, bound in BOUNDS.items():
        own = getattr(policy.limits, name)
        limits[name] = own if own is None else min(own, bound)
    for name, room in ROOM.items():
        own = getattr(policy.limits, name)
        limits[name] = own if own is None else max(own, room)
    wanted = override(policy, **limits)
    if wanted.syscalls is not None and wanted.syscalls.on_denied == "kill":
        wanted = msgspec.structs.replace(wanted, syscalls=msgspec.structs.replace(wanted.syscalls, on_denied="errno"))
    return wanted


def _owner(pid: int | None) -> int:
    """The user that a process has on the host; -1 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("Uid:"):
                return int(line.split()[1])
    return -1


# ---------------------------------------------------------------- runs that an attack ends


def _survives(source: str, **limits: float) -> Callable[[Policy], Outcome]:
    """A program that goes a bounded way beyond a limit. The limits that the policy has are set to these numbers."""

    def run(policy: Policy) -> Outcome:
        own = {name: number for name, number in limits.items() if getattr(policy.limits, name) is not None}
        result = Jail(override(_with_room(policy), **own), stock=0).run_python(f"{source}\nprint('survived')")
        return Outcome(b"survived" in result.stdout, result.summary)

    return run


def _output(policy: Policy) -> Outcome:
    limits = {"output": MIB // 4} if policy.limits.output is not None else {}
    result = Jail(override(_with_room(policy), **limits), stock=0).run_python("import sys; sys.stdout.write('x' * (1 << 20))")
    return Outcome(not result.stdout_cut, result.summary)


def _killed(source: str) -> Callable[[Policy], Outcome]:
    """A program that the filter ends with SIGSYS."""

    def run(policy: Policy) -> Outcome:
        result = Jail(_with_room(policy), stock=0).run_python(source + "\nprint('survived')")
        if platform.machine() != "x86_64":
            return Outcome(False, "", "only x86-64 has this table")
        if result.signal in (signal.SIGSEGV, signal.SIGILL):
            return Outcome(False, "", "this kernel has no 32-bit entry")
        return Outcome(result.verdict is not Verdict.syscall, result.summary)

    return run


def _denied_ends(policy: Policy) -> Outcome:
    wanted = _with_room(policy)
    if wanted.syscalls is not None and policy.syscalls is not None:
        wanted = msgspec.structs.replace(wanted, syscalls=msgspec.structs.replace(wanted.syscalls, on_denied=policy.syscalls.on_denied))
    result = Jail(wanted, stock=0).run_python("import ctypes; ctypes.CDLL(None).syscall(1023); print('survived')")
    return Outcome(b"survived" in result.stdout, result.summary)


I386 = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex('b814000000cd80c3'))  # mov $20, %eax; int $0x80; ret: getpid
ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""
BURN = "import time\nwhile time.process_time() < 1.2: pass"
HOLD = "open('/tmp/held', 'wb').write(bytes(64 << 20)); held = b'x' * (64 << 20)"

TRIALS: dict[str, Callable[[Policy], Outcome]] = {
    "memory": _survives("held = b'x' * (160 << 20)", memory=96 * MIB),
    "memory-together": _survives(HOLD, memory=96 * MIB, disk=80 * MIB, file_size=80 * MIB),
    "cpu-time": _survives(BURN, cpu_time=0.3),
    "wall-time": _survives("import time; time.sleep(0.8)", wall_time=0.3),
    "idle-time": _survives("import time; time.sleep(1.2)", idle_time=0.3),
    "output": _output,
    "x32": _killed("import ctypes; ctypes.CDLL(None).syscall(0x40000000 | 39)"),
    "i386": _killed(I386),
    "denied-ends": _denied_ends,
}


# ---------------------------------------------------------------- what is left afterwards


def _left(policy: Policy, canaries: Canaries, before: dict[str, int]) -> dict[str, Outcome]:
    """before: what was there when no run had been made."""
    outcomes = {}
    try:
        found = _until(lambda: not canaries.left_processes()) or f"process {canaries.left_processes()[0]}"
        outcomes["left-processes"] = Outcome(found is not True, "" if found is True else str(found))
        later, _, _ = _probe(policy, canaries, ["left-files", "left-memory"])
        outcomes |= later
        outcomes["dead-caller"] = _dead_caller(policy)
    finally:
        canaries.clear_away()
        if policy.workdir is not None:
            _remove_below(policy.workdir, f"{canaries.marker}-left")
    settled = _until(lambda: not _grown(before))
    outcomes["left-on-host"] = Outcome(not settled, "" if settled else _grown(before))
    return outcomes


def _grown(before: dict[str, int]) -> str:
    """What there is more of; a run of somebody else's in this process may have ended meanwhile."""
    return ", ".join(f"{name} {before[name]} -> {now}" for name, now in traces().items() if now > before[name])


def _remove_below(folder: str, name: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.unlink(name, dir_fd=descriptor)
        finally:
            os.close(descriptor)


def _until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS_TO_CLEAR
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def traces() -> dict[str, int]:
    """What runs of this process could leave on the host, counted."""
    groups = [path for top in launcher.current().claim.directories.values() for path, _, _ in os.walk(top)]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    cells = 0
    for child in children:
        with contextlib.suppress(OSError):
            cells += len(Path(f"/proc/{child}/task/{child}/children").read_text().split())
    open_now = [number for number in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) if os.path.exists(f"/proc/self/fd/{number}")]
    plans = [number for number in open_now if _link(number).startswith("/memfd:plan")]
    return {
        "descriptors": len(open_now) - len(plans),
        "processes": len(children) + cells,
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "control groups": len(groups),
    }


def _link(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


CALLER = """
import sys, time, msgspec, nsjail_py
policy = msgspec.json.decode(sys.stdin.buffer.read(), type=nsjail_py.Policy)
process = nsjail_py.Jail(policy, stock=0).start_python("import time; time.sleep(30)")
print(process.pid, flush=True)
time.sleep(30)
"""


def _dead_caller(policy: Policy) -> Outcome:
    """A caller is killed in the middle of a run."""
    command = [sys.executable, "-c", CALLER]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as caller:
        assert caller.stdin is not None and caller.stdout is not None
        caller.stdin.write(msgspec.json.encode(_with_room(policy)))
        caller.stdin.close()
        told = caller.stdout.readline().strip()
        caller.kill()
    if not told.isdigit():
        return Outcome(True, "the check itself failed: no run was started")
    path = Path(f"/proc/{int(told)}")
    return Outcome(not _until(lambda: not path.exists()), "")


# ---------------------------------------------------------------- how it is told


def text(found: Report) -> str:
    """The report for a person: a table, and the count of each state."""
    width = max(len(check.promise) for check in found.checks if len(check.promise) <= 72)
    lines = [f"Policy {found.policy}, mode {found.mode}", ""]
    area = ""
    for check in found.checks:
        if check.area != area:
            area = check.area
            lines.append(area)
        told = check.layer if check.state == "held" else check.detail
        lines.append(f"  {check.state:<12}  {check.promise:<{width}}  {told}".rstrip())
    counts = {state: sum(check.state == state for check in found.checks) for state in ("held", "FAILED", "not promised", "unavailable")}
    return "\n".join([*lines, "", f"{', '.join(f'{count} {state}' for state, count in counts.items())}, in {found.seconds:.1f} s"])


def to_dict(found: Report) -> dict[str, Any]:
    """The report, ready for JSON."""
    return {**found._asdict(), "ok": found.ok, "checks": [check._asdict() for check in found.checks]}


def main(policy: str, json: bool = False) -> int:
    """Prints the report. 0 when no promise failed, 1 otherwise."""
    found = report(policy)
    print(jsonlib.dumps(to_dict(found), indent=2) if json else text(found))
    return 0 if found.ok else 1
