"""What was denied, and why: a result's denials as sentences, each with the lines of a policy that would allow it, and their risk.

The result is the launcher's word. What the program printed is the program's own, so it is only repeated as such, and as advice.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import syscalls, toml
from .errors import PolicyError
from .oneline import one_line
from .policy import Policy, Syscalls
from .policyfile import load, names
from .result import FURTHER_CALLS, Result, Verdict
from .units import format_size, format_time

MAX_REPORT = 64 * 1024**2
LAST_WORDS = 4000
"""Characters of standard error that are looked at."""


class Way(NamedTuple):
    """One way to allow what was denied."""

    lines: tuple[str, ...]
    """Lines for the policy file, tables and all."""
    risk: str


class Denial(NamedTuple):
    """One thing that the program could not do."""

    what: str
    why: str
    ways: tuple[Way, ...]
    """None: no policy should."""


SET_RISKS = {
    "essential": "none: every policy has it",
    "files": "the kernel's file systems are a large interface; what can be reached is decided by the root and the mounts",
    "file-attributes": "attributes and access lists outlive the run on what is mounted writable",
    "memory": "small: hints and locks within the limit",
    "time": "precise clocks help side channels; timers cost little",
    "signals": "its own processes can be signalled; nobody else is in its process namespace",
    "identity": "it learns about its machine what `uname` tells; it becomes nobody else",
    "threads": "threads share one process; races in the kernel are tried with them",
    "processes": "more processes to count and to kill; races in the kernel are tried with them",
    "events": "epoll has had faults in the kernel; nothing new can be reached",
    "file-watch": "it learns when shown files change",
    "socket-pair": "the kernel's code for local sockets is open to it; nobody new can be reached",
    "local-sockets": "it reaches every socket that is visible as a file in a mount, the services behind them included",
    "inet-sockets": "the kernel's network code is open to it; without `net` in namespaces, the host's network as well",
    "shared-objects": "memory and files that no mount option holds: what is written there can be executed where exec is allowed",
    "priority": "it learns about processors and chooses among them, which helps side channels",
    "terminal": "small: only harmless requests pass",
}
"""What is risked by a set, in one sentence."""
NEVER_RISKS = (
    (
        r"ptrace|process_.*|pidfd_getfd|kcmp",
        "it reads and changes the memory of other processes of its user; many ways out went through it",
    ),
    (r"io_uring_.*", "calls made through it pass by the filter, and its faults in the kernel are many"),
    (r"keyctl|add_key|request_key", "keyrings are not of a namespace of their own"),
    (r"bpf|perf_event_open|userfaultfd", "whole subsystems rich in faults; exploits of the kernel lean on them"),
    (
        r"(u?mount|pivot_root|chroot|fs\w+|move_mount|open_tree|setns|unshare)\w*",
        "new namespaces and mounts are new ways into the kernel, and undo the view",
    ),
    (r"name_to_handle_at|open_by_handle_at", "files outside the root are opened by their handle"),
    (
        r"\w*module|kexec\w*|reboot|swapo\w+|iopl|ioperm|acct|syslog|quotactl\w*",
        "they are the administrator's; without his rights they fail anyway",
    ),
)
"""For calls that no shipped policy has."""
UNJUDGED = "no shipped policy has this call: nobody here has judged what it opens"
EXEC_RISK = "it runs any program that it can see: show none but those that it needs. Exploits bring their next stage as a program"
WRITTEN_RISK = "what it wrote or was sent becomes a program; a bug in the interpreter is then enough for any code"
LIMIT_RISKS = {
    "wall_time": "the run holds its place for longer",
    "cpu_time": "it takes processor time from others for longer",
    "idle_time": "it holds its place for longer without doing anything",
    "memory": "the host must have it to spare, for every run at one time",
    "processes": "each costs the kernel memory, and the host a share of its processor",
    "output": "the caller keeps all of it in memory",
    "disk": "/work and /tmp are memory",
    "file_size": "larger files on what is mounted writable",
}
LIMIT_OF = {
    Verdict.wall_time: "wall_time",
    Verdict.cpu_time: "cpu_time",
    Verdict.idle: "idle_time",
    Verdict.memory: "memory",
    Verdict.processes: "processes",
    Verdict.output: "output",
}
CONDITIONAL = "with these arguments"
OUTSIDE = "the host had no more, or a control group above the jail: raise that limit, or run fewer at one time. No policy has a say in it"


def why(result: Result | Mapping[str, Any], policy: Policy | None = None) -> list[Denial]:
    """The denials of a result, or of its JSON. policy: the one that it ran under; without it, the shipped one of that name.
    Raises PolicyError for what is no result."""
    report: Mapping[str, Any] = result.to_dict() if isinstance(result, Result) else result
    try:
        verdict, denied = Verdict(report["verdict"]), {str(name): int(count) for name, count in report["denied"].items()}
        evidence, said = dict(report["evidence"]), str(report.get("stderr") or "")
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        raise PolicyError("this is no result of nsjail-py: write one with --report FILE, or --json") from None
    if policy is None and isinstance(result, Result):
        policy = result.settled
    if policy is None and report.get("policy") in names():
        policy = load(str(report["policy"]))
    found = [_call(name, count, policy) for name, count in denied.items()]
    found += _limit(verdict, evidence)
    found += [Denial(f"{what} around the jail", OUTSIDE, ()) for what in str(evidence.get("outside") or "").split(", ") if what]
    found += _execution(verdict, evidence)
    if report.get("stderr_encoding", "utf-8") == "utf-8":
        found += _last_words(said[-LAST_WORDS:], policy)
    return found


def read(path: str) -> Mapping[str, Any]:
    """A report's file. Raises PolicyError."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_REPORT + 1)
        if len(data) > MAX_REPORT:
            raise PolicyError(f"{path}: larger than {MAX_REPORT} bytes")
        report = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"{path}: {getattr(error, 'strerror', None) or 'is not JSON'}") from None
    if not isinstance(report, dict):
        raise PolicyError(f"{path}: is no result of nsjail-py")
    return report


def text(found: list[Denial]) -> str:
    """For a person."""
    if not found:
        return "nothing was denied, as far as the result tells"
    lines = []
    for one in found:
        lines.append(f"{one.what}: {one.why}")
        for number, way in enumerate(one.ways):
            lines.append("  to allow it:" if number == 0 else "  or:")
            lines += [f"      {line}" for line in way.lines]
            lines.append(f"    risk: {way.risk}")
        if not one.ways and one.why != OUTSIDE:
            lines.append("  no policy should allow it")
    return "\n".join(map(one_line, lines))


# ---------------------------------------------------------------- system calls


def _call(name: str, count: int, policy: Policy | None) -> Denial:
    what = f"{name}, {count} times" if count > 1 else name
    if name in ("execve", "execveat"):
        reason = "the program may not execute another once it runs (exec = false)"
        lines = ("[syscalls]", "exec = true", "[[mounts]]", 'source = "/usr/bin/PROGRAM"', 'target = "/usr/bin/PROGRAM"')
        return Denial(what, reason, (Way(lines, EXEC_RISK),) if name == "execve" else ())
    if name == FURTHER_CALLS:
        return Denial(what, "a report has place for so many different calls only: ask again when the policy allows what is above", ())
    if name.startswith("syscall ") or not re.fullmatch(r"\w+", name, re.A):
        return Denial(what, "the installed libseccomp does not know this number: a newer kernel's call, or none", ())
    through = syscalls.only_through(name)
    if not through and (problems := syscalls.name_problems(Syscalls(allow=(name,)))):
        return Denial(what, problems[0].partition(": ")[2], ())
    allows = syscalls.calls_of(policy.syscalls) if policy and policy.syscalls else []
    conditions = [rule["why"] for rule in syscalls.argument_rules() if name in rule["args"]]
    if name in allows and not through:
        return Denial(what, f"the policy allows it, but not {CONDITIONAL}. {' '.join(conditions)}".strip(), ())
    reason = f"the policy allows it, but not {CONDITIONAL}" if name in allows else "the policy does not have this system call"
    ways = [_way(choice, name, policy) for choice in through or [name] if not _has(policy, choice)]
    for pattern, risk in NEVER_RISKS:
        if name in syscalls.never() and re.fullmatch(pattern, name):
            reason = f"no shipped policy has this system call: {risk}"
    return Denial(what, reason, tuple(ways))


def _has(policy: Policy | None, entry: str) -> bool:
    return policy is not None and policy.syscalls is not None and entry in policy.syscalls.allow


def _way(entry: str, name: str, policy: Policy | None) -> Way:
    risk = SET_RISKS[entry[1:]] if entry.startswith("@") else _risk(name)
    if policy is None or policy.syscalls is None:
        return Way(("[syscalls]", f"allow = {toml.array([entry])} # beside what the list has"), risk)
    denied = [one for one in policy.syscalls.deny if one in (entry, name)]
    lines = ["[syscalls]", f"allow = {toml.array([*policy.syscalls.allow, entry])}"]
    if denied:
        lines.append(f"deny = {toml.array(one for one in policy.syscalls.deny if one not in denied)}")
    return Way(tuple(lines), risk)


def _risk(name: str) -> str:
    if name in syscalls.never():
        return next((risk for pattern, risk in NEVER_RISKS if re.fullmatch(pattern, name)), UNJUDGED)
    holders = [one for one in syscalls.sets() if name in syscalls.alternatives(f"@{one}")]
    return SET_RISKS[holders[0]] if holders else UNJUDGED


# ---------------------------------------------------------------- limits and the rest


def _limit(verdict: Verdict, evidence: dict[str, Any]) -> Iterator[Denial]:
    field = LIMIT_OF.get(verdict) or ("file_size" if "signal" in evidence else "disk") if verdict.is_limit else None
    limit = evidence.get("limit")
    if (
        verdict is Verdict.syscall
        or field is None
        or not isinstance(limit, (int, float))
        or isinstance(limit, bool)
        or not 0 < limit < 2**60
    ):
        return
    twice: int | str = 2 * int(limit)
    if field.endswith("_time"):
        twice = toml.string(format_time(2 * limit))
    elif field != "processes":
        twice = toml.string(format_size(2 * int(limit)))
    yield Denial(f"limit {field}", f"the run reached it ({verdict})", (Way(("[limits]", f"{field} = {twice}"), LIMIT_RISKS[field]),))


def _execution(verdict: Verdict, evidence: dict[str, Any]) -> Iterator[Denial]:
    if verdict is not Verdict.exec_failed:
        return
    if evidence.get("errno") == 13:
        yield Denial("the program", "lies where nothing may be executed", (Way(("exec_in_writable = true",), WRITTEN_RISK),))
    else:
        reason = "the program, or the interpreter or loader that it names, is not in the view"
        yield Denial("the program", reason, (Way(_mount("/PATH"), "what is shown can be read"),))


def _mount(path: str, writable: bool = False) -> tuple[str, ...]:
    lines = ("[[mounts]]", f"source = {toml.string(path)}", f"target = {toml.string(path)}")
    return (*lines, "writable = true") if writable else lines


def _last_words(said: str, policy: Policy | None) -> Iterator[Denial]:
    """What a Python program's last exception tells, in its own words."""
    if (
        re.search(r"^MemoryError", said, re.M) and policy and policy.limits.memory
    ):  # where each process has its own limit, nobody else knows
        more = f"memory = {toml.string(format_size(2 * policy.limits.memory))}"
        yield Denial("memory", "the program says that it got no more", (Way(("[limits]", more), LIMIT_RISKS["memory"]),))
    imports = list(policy.python.imports) if policy else []
    for module in dict.fromkeys(re.findall(r"^ModuleNotFoundError: No module named '([\w.]{1,80})'", said, re.M)):
        top = module.partition(".")[0]
        lines = ("[python]", f"imports = {toml.array([*imports, top])}")
        yield Denial(
            f"import of {module}",
            "the program says that there is no such module: only listed distributions are shown",
            (Way(lines, "its code, and that of what it requires, runs inside; the jail is the same"),),
        )
    for error, path in dict.fromkeys(re.findall(r"^(\w+Error): \[Errno \d+\] [^\n':]{1,60}: '(/[^'\n]{1,400})'", said, re.M)):
        if error == "FileNotFoundError" and os.path.exists(path):
            yield Denial(
                f"file {path}",
                "the program says that it is not there: it is on the host, and not shown",
                (Way(_mount(path), "it can read this, and write what it reads to its output"),),
            )
        elif error == "OSError" and "Read-only" in said:
            yield Denial(
                f"change of {path}",
                "the program says that it is read-only: only /work, /tmp and /dev/shm can be written",
                (Way(_mount(os.path.dirname(path), True), "it can destroy and fill this directory of the host"),),
            )
