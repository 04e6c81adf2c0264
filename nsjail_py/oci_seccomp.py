"""Seccomp profiles of the Open Container Initiative, read and written. config-linux.md of opencontainers/runtime-spec

Read: a profile becomes `[syscalls]` of a policy. What this project looks into more closely than a profile (the flags of clone, the families
of socket) is taken through the set that does so; what no shipped policy has is left out. So the policy allows the profile's calls or fewer,
and the few without which no program starts (@essential), and says where it is fewer or more. Written: a policy's rules, one by one.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import msgspec

from . import syscalls, toml
from .errors import PolicyError
from .policy import Syscalls
from .prepared import prepared

MAX_PROFILE = 4 * 1024**2
ALLOWING = frozenset({"SCMP_ACT_ALLOW", "SCMP_ACT_LOG"})
DENYING = frozenset(
    {
        "SCMP_ACT_ERRNO",
        "SCMP_ACT_KILL",
        "SCMP_ACT_KILL_PROCESS",
        "SCMP_ACT_KILL_THREAD",
        "SCMP_ACT_TRAP",
        "SCMP_ACT_TRACE",
        "SCMP_ACT_NOTIFY",
    }
)
KILLING = frozenset({"SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD"})
MACHINES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}
OLDEST = (5, 12)
"""The kernel that jails need."""
EPERM, ENOSYS = 1, 38


class Condition(msgspec.Struct, rename="camel"):
    """One condition on an argument; a policy has its own."""

    index: int
    value: int = 0
    value_two: int = 0
    op: str = ""


class When(msgspec.Struct, rename="camel"):
    """What Docker's profiles say about when a rule counts: they are templates, which an engine fills in."""

    caps: list[str] | None = None
    arches: list[str] | None = None
    min_kernel: str | None = None


class Rule(msgspec.Struct):
    """Some calls, and what becomes of them."""

    action: str
    names: list[str] | None = None
    name: str | None = None
    args: list[Condition] | None = None
    includes: When | None = None
    excludes: When | None = None


@prepared
class Profile(msgspec.Struct, rename="camel"):
    """A profile, as far as it is looked at."""

    default_action: str
    syscalls: list[Rule] = []


Allowed = dict[str, list[list[Condition]]]
"""For each call the alternatives of a profile: conditions that must all hold, none for a call that is allowed as it is."""


class Imported(NamedTuple):
    """What a profile comes to."""

    syscalls: Syscalls
    notes: list[str]
    """Where the policy allows less than the profile, or more, since every policy does."""

    def __str__(self) -> str:
        lines = [f"# {toml.comment(note)}" for note in self.notes] + ["[syscalls]", f"exec = {str(self.syscalls.exec).lower()}"]
        lines += [f"on_denied = {toml.string(self.syscalls.on_denied)}", "allow = ["]
        names = [toml.string(name) for name in self.syscalls.allow]
        lines += [f"    {', '.join(names[first : first + 8])}," for first in range(0, len(names), 8)]
        return "\n".join([*lines, "]"]) + "\n"


def load(path: str | os.PathLike[str]) -> Imported:
    """The profile in a file. Raises PolicyError."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PROFILE + 1)
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror}") from None
    if len(data) > MAX_PROFILE:
        raise PolicyError(f"{path}: larger than {MAX_PROFILE} bytes: this is no profile")
    try:
        return read(data)
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None


def read(data: bytes) -> Imported:
    """A profile's JSON as system calls of a policy. Raises PolicyError for what is none, and for one that allows what it does not name."""
    try:
        profile = msgspec.json.decode(data, type=Profile)
    except (msgspec.DecodeError, RecursionError) as error:
        raise PolicyError(f"is no seccomp profile: {error}") from None
    if profile.default_action not in DENYING:
        raise PolicyError(
            f"defaultAction {profile.default_action!r}: a policy is a list of what is allowed, and this one lists what is not"
        )
    allowed: dict[str, list[list[Condition]]] = {}
    denied: set[str] = set()
    for rule in profile.syscalls:
        if rule.action not in ALLOWING | DENYING:
            raise PolicyError(f"unknown action {rule.action!r}")
        names = [*(rule.names or ()), *([rule.name] if rule.name else ())]
        if not _counts(rule):
            continue
        if rule.action in DENYING:
            denied |= set(names)  # with some arguments only: then all of it, which is less and not more
        else:
            for name in names:
                allowed.setdefault(name, []).append(rule.args or [])
    entries, notes = _entries({name: rules for name, rules in allowed.items() if name not in denied})
    kill = "kill" if profile.default_action in KILLING else "errno"
    executes = [] in allowed.get("execve", []) and "execve" not in denied
    return Imported(Syscalls(allow=tuple(entries), exec=executes, on_denied=kill), notes)  # type: ignore[arg-type]


def _counts(rule: Rule) -> bool:
    """Whether an engine would take a rule for a container without capabilities on this machine. A policy is for any kernel: what one of
    them may lack is allowed on none, and denied on all."""
    arch = MACHINES.get(os.uname().machine, ("", ""))[0]
    includes, excludes = rule.includes or When(), rule.excludes or When()
    if includes.caps or (includes.arches and arch not in includes.arches):
        return False
    allows = rule.action in ALLOWING
    if allows and (excludes.min_kernel or (includes.min_kernel and not _is_old(includes.min_kernel))):
        return False
    return not (excludes.arches and arch in excludes.arches)


def _is_old(kernel: str) -> bool:
    """Whether each kernel that jails run on is as new as this."""
    numbers = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", kernel)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) <= OLDEST


def _entries(allowed: Allowed) -> tuple[list[str], list[str]]:
    """The entries of `allow`, sets first, and what is left out."""
    entries: dict[str, None] = {}
    notes: list[str] = []
    never = set(syscalls.never())
    essential = syscalls.alternatives("@essential")
    notes += [
        f"{name}: allowed beyond the profile; without it no program would even start"
        for name, ours in sorted(essential.items())
        if not _covered(ours, allowed.get(name, []))
    ]
    for name, rules in sorted(allowed.items()):
        through = [entry for entry in syscalls.only_through(name) if _within(entry, allowed)]
        if name == "execve" or name in essential:
            continue
        if name in never:
            notes.append(f"{name}: left out; no shipped policy has it, and it can be added by name")
        elif syscalls.only_through(name):
            entries |= dict.fromkeys(through)
            notes.append(
                f"{name}: through {', '.join(through)}, which look at its arguments" if through else f"{name}: left out; no set fits"
            )
        elif [] not in rules:
            notes.append(f"{name}: left out; the profile allows it with some arguments only")
        elif problems := syscalls.name_problems(Syscalls(allow=(name,))):
            if "libseccomp knows" not in problems[0]:  # another machine's, mostly
                notes.append(problems[0].partition(": ")[2])
        else:
            entries[name] = None
    covered = {call for entry in entries if entry.startswith("@") for call in syscalls.alternatives(entry)}
    return sorted((one for one in entries if one.startswith("@") or one not in covered), key=lambda one: (one[0] != "@", one)), notes


def _within(entry: str, allowed: Allowed) -> bool:
    """Whether a set brings nothing that the profile does not have."""
    return all(_covered(ours, allowed.get(call, [])) for call, ours in syscalls.alternatives(entry).items())


def _covered(ours: set[tuple[syscalls.Condition, ...]], theirs: list[list[Condition]]) -> bool:
    """Whether each of our alternatives for a call is one of the profile's for certain."""
    return all(any(all(_implies(alternative, one) for one in conditions) for conditions in theirs) for alternative in ours)


def _implies(alternative: tuple[syscalls.Condition, ...], wanted: Condition) -> bool:
    """Whether arguments that pass our conditions pass one of the profile's for certain."""
    for index, mask, value in alternative:
        if index != wanted.index:
            continue
        if wanted.op == "SCMP_CMP_MASKED_EQ" and mask & wanted.value == wanted.value and value & wanted.value == wanted.value_two:
            return True
        if wanted.op == "SCMP_CMP_NE" and value & mask != wanted.value & mask:
            return True
        if wanted.op == "SCMP_CMP_EQ" and mask == syscalls.INT and value == wanted.value:
            return True
    return False


def write(policy: Syscalls, executes: bool) -> dict[str, Any]:
    """The `seccomp` of an OCI runtime's configuration. executes: execve is allowed once more, since the runtime itself needs it."""
    rules = []
    for call, alternatives in sorted(syscalls.rules_of(policy).items()):
        for alternative in sorted(alternatives):
            rule: dict[str, Any] = {"names": [call], "action": "SCMP_ACT_ALLOW"}
            if alternative:
                rule["args"] = [
                    {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"} for index, mask, value in alternative
                ]
            rules.append(rule)
    if executes:
        rules.append({"names": ["execve"], "action": "SCMP_ACT_ALLOW"})
    rules.append({"names": syscalls.absent(), "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS})
    machine = MACHINES[os.uname().machine][1]
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": EPERM, "architectures": [machine], "syscalls": rules}
